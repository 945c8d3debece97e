"""The same update and the same training step by mmrl and by TRL, for language_update.

Both load the same random-weight Qwen3 from a folder and train it in float32 without gradient
checkpointing, with the token mean of GRPO's clipped surrogate on one group.  TRL is its own
``GRPOTrainer``: ``compute_loss`` and a backward for an update, ``training_step`` for a whole step.
"""

from __future__ import annotations

import contextlib
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn

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
PAD, END = 0, 1
MEAN_LENGTH, MAX_LENGTH = 64, 96


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of the prompt and of the vocabulary; ``trained``: adapters, or every parameter."""

    prompt: int
    vocabulary: int
    trained: str = "lora"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A group: token ids of its completions, and their advantages."""

    completions: Sequence[Sequence[int]]
    advantages: Sequence[float]

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(len(ids) for ids in self.completions)


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


def make_model(folder: Path, shape: Shape, **changes: Any) -> None:
    """Write a random-weight Qwen3 and its tokenizer, whose tokens are words; ``changes``: of sizes.

    Enough tokens end a completion for samples of the model to have ``MEAN_LENGTH`` tokens, were
    they not cut at ``MAX_LENGTH``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils import logging

    words = {word(i): i for i in range(shape.vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token=word(PAD)))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=word(PAD), unk_token=word(PAD), eos_token=word(END)
    )
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
             "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}  # fmt: skip
    config = Qwen3Config(
        **sizes | changes,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.prompt + MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Qwen3ForCausalLM(config)
    ends = range(END, END + max(1, shape.vocabulary // MEAN_LENGTH))
    network.generation_config.eos_token_id = list(ends)
    logging.disable_progress_bar()
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def word(token: int) -> str:
    """The text of a token of the toy; none is the beginning of a special one."""
    return {PAD: "<pad>", END: "<end>"}.get(token, f"w{token}")


def prompt_of(shape: Shape) -> str:
    """A text of ``shape.prompt`` tokens that end no completion."""
    return " ".join(word(token) for token in _tokens(shape, shape.prompt, seed=1))


def make_work(shape: Shape, group_size: int) -> Work:
    """Random completions, from half to one and a half times ``MEAN_LENGTH`` long."""
    lengths = torch.linspace(MEAN_LENGTH // 2, MAX_LENGTH, group_size).long().tolist()
    generator = torch.Generator().manual_seed(0)
    return Work(
        completions=[_tokens(shape, n, seed=2 + i) for i, n in enumerate(lengths)],
        advantages=torch.randn(group_size, generator=generator).tolist(),
    )


def _tokens(shape: Shape, count: int, seed: int) -> list[int]:
    first = END + max(1, shape.vocabulary // MEAN_LENGTH)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(first, shape.vocabulary, (count,), generator=generator).tolist()


def varied(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """A reward that costs nothing and differs between completions, as TRL calls it."""
    del prompts, columns
    return [zlib.crc32(text.encode()) / 2**32 for text in completions]


def open_peer(form: str, folder: Path, shape: Shape, group_size: int) -> Peer:
    """The system of one of ``FORMS``, on the model in ``folder``."""
    system = Mmrl if form in OURS else Trl
    return system(folder, shape, group_size).use(form)


class Mmrl:
    """This project's text backend and trainer; see ``Peer``."""

    def __init__(self, folder: Path, shape: Shape, group_size: int) -> None:
        source = folder / f"prompt-{shape.prompt}.csv"
        source.write_text(f"prompt\n{prompt_of(shape)}\n", encoding="utf-8")
        self.config = _run(folder, source, shape, group_size)
        self.session = runner.open_session(self.config)
        self.backend: Any = self.session.backend
        self._trainer: Any = None
        randomise(self.parameters())

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
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOTrainer  # pyright: ignore[reportMissingImports]

        self.trainer: Any = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            args=_grpo_config(tempfile.mkdtemp(dir=folder), group_size),
            processing_class=AutoTokenizer.from_pretrained(folder),
            train_dataset=Dataset.from_list([{"prompt": prompt_of(shape)}] * group_size),
            reward_funcs=varied,
            peft_config=_peft_config() if shape.trained == "lora" else None,
        )
        self._rows = [{"prompt": prompt_of(shape)}] * group_size
        self._compact = False
        self._optimizer = torch.optim.AdamW(self.parameters().values(), lr=LEARNING_RATE)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        randomise(self.parameters())

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

    def _inputs(self, work: Work) -> dict[str, Tensor]:
        """What ``_generate_and_score_completions`` returns."""
        text = self._rows[0]["prompt"]
        ids = self.trainer.processing_class(text, return_tensors="pt").input_ids
        prompts = ids.expand(len(work.completions), -1)
        completions = reduction.side_by_side([torch.tensor(ids) for ids in work.completions])
        return {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
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


def randomise(parameters: dict[str, nn.Parameter]) -> None:
    """Adapters at random, the same for the same names: as they start, half have no gradient."""
    for name, parameter in sorted(parameters.items()):
        if "lora_" in name:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
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
    return configuration.parse(
        {
            "name": "language-update",
            "output_dir": str(folder / "run"),
            "backend": {
                "name": "text",
                "model": {
                    "path": str(folder),
                    "dtype": "fp32",
                    "lora": LORA if shape.trained == "lora" else None,
                },
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


def _grpo_config(folder: str, group_size: int) -> Any:
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
