"""The same update and the same training step by mmrl and by TRL, for language_update.

Both load the same random-weight model from a folder and train it in float32 without gradient
checkpointing, with the token mean of GRPO's clipped surrogate on one group.  TRL is its own
``GRPOTrainer``: ``compute_loss`` and a backward for an update, ``training_step`` for a whole step.
"""

from __future__ import annotations

import contextlib
import csv
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.language_toys import MAX_LENGTH, MODALITIES, Shape, Work
from mmrl import config as configuration
from mmrl import reduction, runner
from mmrl.config import RunConfig
from mmrl.objectives import grpo
from mmrl.text.layout import Row
from mmrl.text.loading import LORA_TARGETS
from mmrl.types import UpdateBatch
from mmrl.weights import trainable

OURS = ("shared_prompt", "packed", "padded")
TRL, TRL_COMPACT = "TRL", "TRL, compact head"
FORMS = (*OURS, TRL, TRL_COMPACT)
LORA = {"rank": 16, "alpha": 32}
LEARNING_RATE = 1e-6
TRAINED = ("lora", "full")


class Peer(Protocol):
    """A system with a model of its own."""

    def use(self, form: str) -> Peer:
        """Itself, in another of its ``FORMS`` from now on."""
        ...

    def update(self, work: Work) -> None:
        """Forward and backward into ``.grad``."""
        ...

    def step(self) -> int:
        """Sample a group, score it, train on it once; returns the tokens of the completions."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by the name they have in the plain model."""
        ...


def varied(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs between completions, as TRL calls it: with texts, or
    with messages where prompts have pictures.
    """
    del prompts, columns
    return [zlib.crc32(str(completion).encode()) / 2**32 for completion in completions]


def open_peer(form: str, folder: Path, shape: Shape, group_size: int) -> Peer:
    """The system of one of ``FORMS``, on the model in ``folder``."""
    system = Mmrl if form in OURS else Trl
    return system(folder, shape, group_size).use(form)


class Mmrl:
    """This project's backend and trainer; see ``Peer``."""

    def __init__(self, folder: Path, shape: Shape, group_size: int) -> None:
        source = folder / f"prompt-{shape.prompt}.csv"
        prompt = MODALITIES[shape.modality].prompt(shape, folder)
        with source.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([prompt.keys(), prompt.values()])
        self.config = _run(folder, source, shape, group_size)
        self.session = runner.open_session(self.config)
        self.backend: Any = self.session.backend
        self._trainer: Any = None
        randomise(self.parameters(), shape.seed)

    def use(self, form: str) -> Mmrl:
        """See ``Peer``."""
        self.backend.config = self.backend.config.model_copy(update={"update": form})
        return self

    def update(self, work: Work) -> None:
        """See ``Peer``."""
        batch = self._batch(work)
        terms = self.backend.evaluate(batch, frozenset({"logp"}))
        loss = grpo.loss(terms, batch, grpo.Config()).loss
        kind = "decision_mean"
        weights = reduction.decision_weights(batch.mask, batch.weights, kind)
        count = reduction.denominator(batch.mask, batch.weights, kind)
        (reduction.weighted_sum(loss, weights) / count).backward()

    def step(self) -> int:
        """See ``Peer``."""
        self._trainer = self._trainer or runner.make_trainer(self.session)
        return round(self._trainer.step()["completions/mean_length"] * self._group_size)

    def parameters(self) -> dict[str, nn.Parameter]:
        """See ``Peer``."""
        return trainable(self.backend._network)

    @property
    def _group_size(self) -> int:
        return self.config.training.group_size

    def _batch(self, work: Work) -> UpdateBatch:
        prompt = self.backend._prompt(self.session.training_prompts[0])
        count = len(work.completions)
        return UpdateBatch(
            payload=[Row(prompt=prompt, completion=ids) for ids in work.completions],
            mask=_mask(work),
            advantages=torch.tensor(work.advantages, dtype=torch.float64),
            weights=torch.ones(count, dtype=torch.float64),
        )


class Trl:
    """TRL's ``GRPOTrainer``; see ``Peer``.

    On a CPU its head scores every position, those of prompts and of padding too; in the form
    ``TRL_COMPACT`` those of completion tokens only, as it does on CUDA.
    """

    def __init__(self, folder: Path, shape: Shape, group_size: int) -> None:
        from datasets import Dataset
        from transformers import AutoProcessor
        from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

        modality = MODALITIES[shape.modality]
        processor = AutoProcessor.from_pretrained(folder)
        self._rows = [modality.row(modality.prompt(shape, folder))] * group_size
        self._prompts = modality.read(processor, self._rows)
        self.trainer: Any = GRPOTrainer(
            model=modality.load(folder),
            args=_grpo_config(tempfile.mkdtemp(dir=folder), group_size, modality.BANNED),
            processing_class=processor,
            train_dataset=Dataset.from_list(self._rows),
            reward_funcs=varied,
            peft_config=_peft_config() if shape.trained == "lora" else None,
        )
        self._compact = False
        self._optimizer = torch.optim.AdamW(self.parameters().values(), lr=LEARNING_RATE)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        randomise(self.parameters(), shape.seed)

    def use(self, form: str) -> Trl:
        """See ``Peer``."""
        self._compact = form == TRL_COMPACT
        return self

    def update(self, work: Work) -> None:
        """See ``Peer``."""
        trainer = self.trainer
        with self._head():
            loss = trainer.compute_loss(trainer.model_wrapped, self._inputs(work))
            trainer.accelerator.backward(loss)

    def step(self) -> int:
        """See ``Peer``."""
        trainer = self.trainer
        with self._head():
            trainer.training_step(trainer.model_wrapped, self._rows, None)
        trainer.accelerator.clip_grad_norm_(self.parameters().values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return int(trainer._buffered_inputs[0]["completion_mask"].sum())

    def parameters(self) -> dict[str, nn.Parameter]:
        """See ``Peer``."""
        found = trainable(self.trainer.model)
        return {name.removeprefix("base_model.model."): value for name, value in found.items()}

    def _inputs(self, work: Work) -> dict[str, Any]:
        """What ``_generate_and_score_completions`` returns."""
        count = len(work.completions)
        # Each tensor has an equal share for every prompt, pixels too.
        found = {k: v[: len(v) * count // len(self._rows)] for k, v in self._prompts.items()}
        completions = reduction.side_by_side([torch.tensor(ids) for ids in work.completions])
        if "mm_token_type_ids" in found:
            kinds = found["mm_token_type_ids"], torch.zeros_like(completions)
            found["mm_token_type_ids"] = torch.cat(kinds, dim=1)
        return {
            **found,
            "num_images": [1] * count if "pixel_values" in found else None,
            "prompt_mask": torch.ones_like(found["prompt_ids"]),
            "completion_ids": completions,
            "completion_mask": _mask(work).long(),
            "advantages": torch.tensor(work.advantages),
            "num_items_in_batch": torch.tensor(work.tokens),
        }

    @contextlib.contextmanager
    def _head(self) -> Iterator[None]:
        if not self._compact:
            yield
            return
        # Here the answer decides which positions are scored; the kernel asks in a place of its own.
        with mock.patch("trl.trainer.utils._use_triton", return_value=True):
            yield


def randomise(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """Adapters at random, the same for the same names: as they start, half have no gradient."""
    for name, parameter in sorted(parameters.items()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}{name}".encode()))
            parameter.data.normal_(std=0.05, generator=generator)


def gradient(peer: Peer) -> dict[str, Tensor]:
    """A copy of ``.grad`` by name, which is then cleared."""
    found = {}
    for name, parameter in peer.parameters().items():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.clone()
        parameter.grad = None
    return found


def gradient_gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over that of ``expected``; infinite if the names differ."""
    if found.keys() != expected.keys():
        return float("inf")
    gap = sum(float((found[k].double() - expected[k].double()).square().sum()) for k in found)
    norm = sum(float(value.double().square().sum()) for value in expected.values())
    return (gap / norm) ** 0.5


def _mask(work: Work) -> Tensor:
    """[G, K] bool."""
    lengths = torch.tensor([len(ids) for ids in work.completions])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _run(folder: Path, source: Path, shape: Shape, group_size: int) -> RunConfig:
    backend = MODALITIES[shape.modality].BACKEND
    lora = LORA if shape.trained == "lora" else None
    return configuration.parse(
        {
            "name": "language-update",
            "output_dir": str(folder / "run"),
            "backend": {
                **backend,
                "model": {**backend["model"], "path": str(folder), "dtype": "fp32", "lora": lora},
                "rollout": {"max_tokens": MAX_LENGTH},
            },
            "prompts": {"source": str(source)},
            "rewards": [
                {
                    "name": "python",
                    "label": "varied",
                    "function": f"{__name__}.varied",
                    "signature": "trl",
                }
            ],
            "advantage": {"name": "group"},
            "objective": {"name": "grpo"},
            "optimizer": {"learning_rate": LEARNING_RATE},
            "training": {
                "num_steps": 1000,
                "prompts_per_step": 1,
                "group_size": group_size,
                "micro_batch_size": group_size,
                "aggregation": "decision_mean",
            },
        }
    )


def _grpo_config(folder: str, group_size: int, banned: list[int]) -> Any:
    from trl import GRPOConfig  # pyright: ignore[reportMissingImports]

    return GRPOConfig(
        output_dir=folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        beta=0.0,
        per_device_train_batch_size=group_size,
        num_generations=group_size,
        max_completion_length=MAX_LENGTH,
        loss_type="dapo",  # the token mean
        generation_kwargs={"suppress_tokens": banned} if banned else None,
        report_to="none",
        disable_tqdm=True,
    )


def _peft_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        target_modules=list(LORA_TARGETS),
        lora_dropout=0.0,
    )
