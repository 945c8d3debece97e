"""Text language models on transformers; a decision is a token.

Completions are sampled from a cache that their group shares, and scored in rows without padding
where each prompt stands once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.adapters import ADAPTER, adapters_off
from mmrl.attention import Availability
from mmrl.errors import UserError
from mmrl.noise import NoiseKey
from mmrl.reduction import side_by_side, tallies
from mmrl.sharding import any_goes_on, gathered
from mmrl.text.config import Config, RolloutConfig
from mmrl.text.demonstrations import Demonstrations, encode_demonstrations
from mmrl.text.estimate import describe, estimate_memory
from mmrl.text.generation import Completion, Settings, generate, statistics
from mmrl.text.head import Scored
from mmrl.text.kernels import Heads, choose
from mmrl.text.layout import Encoded, Row
from mmrl.text.loading import Room, encode, end_tokens, load_network, load_tokenizer
from mmrl.text.scoring import device_of, refuse_wrong_scores, score_rows
from mmrl.types import (
    DTYPES,
    Anchor,
    PolicyTerms,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    UpdateBatch,
)
from mmrl.weights import Snapshot, reshard, trainable, whole

PAPER = "Shao et al. 2024, arXiv:2402.03300"
__all__ = ["PAPER", "Config", "TextBackend", "build", "describe", "estimate_memory"]


class Policy(nn.Module):
    """The network, asked by functions: all work passes one forward, which wrappers can follow."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Any) -> Any:
        """``work(network)``."""
        return work(self.network)


@dataclass(frozen=True, kw_only=True)
class Completions:
    """Payload of a group: its ``prompt``, and its samples."""

    prompt: Encoded
    samples: tuple[Completion, ...]


class TextBackend:
    """See ``mmrl.backend.Backend``."""

    off_policy = False

    def __init__(
        self,
        config: Config,
        network: Any,
        tokenizer: Any,
        prompts: Mapping[str, Encoded],
        *,
        keeps_reference: bool,
        attention: Availability,
        saved: Any = None,
        forbidden: tuple[int, ...] = (),
        demonstrations: Demonstrations | None = None,
    ) -> None:
        """``prompts``: by their ids.  ``keeps_reference``: for ``logp_ref``.  ``attention``: what
        ``mmrl.text.kernels.choose`` says.  ``saved``: what goes with the exported weights in place
        of the tokenizer.  ``forbidden``: ids never sampled, though scores count their probability.
        ``demonstrations``: completions of training prompts, in place of samples.
        """
        self.config = config
        self.attention = attention
        self.notes = _notes(config, attention, forbidden)
        self.model: nn.Module = Policy(network)
        self._network = network
        self._tokenizer = tokenizer
        self._saved = tokenizer if saved is None else saved
        self._forbidden = forbidden
        self._prompts = prompts
        self._demonstrations = demonstrations or {}
        self._ends = end_tokens(tokenizer, network)
        self._keeps_reference = keeps_reference and config.model.lora is None
        self._reference: Snapshot | None = None
        self._dtype = DTYPES[config.model.dtype]

    # Rollout

    def rollout(
        self, requests: Sequence[RolloutRequest], *, evaluation: bool = False
    ) -> Iterator[RolloutGroup]:
        """Yield one group for each request, in order; groups grow side by side in batches.

        In training, demonstrations stand in their place where the data set has them.
        """
        self._take_copies()
        if self.config.demonstrations is not None and not evaluation:
            for request in requests:
                shown = self._demonstrations[request.prompt.id]
                yield self._group(request, (shown,) * request.group_size)
            return
        settings = self.config.sampling(evaluation=evaluation)
        # Completions end after unlike numbers of forwards.
        with gathered(self.model):
            completions = self._completions(requests, settings)
            for request in requests:
                samples = tuple(next(completions) for _ in range(request.group_size))
                yield self._group(request, samples)
            assert next(completions, None) is None, "each completion has a group"

    def _completions(
        self, requests: Sequence[RolloutRequest], settings: RolloutConfig
    ) -> Iterator[Completion]:
        """Samples of all groups, one after another.

        Groups of unlike sizes may make unlike numbers of batches: where processes must keep step,
        one that has no more repeats its last.
        """
        batches = list(_batches(requests, settings.batch_size))
        goes_on, done = any_goes_on(self._network), 0
        while goes_on(done < len(batches)):
            found = self._complete(batches[min(done, len(batches) - 1)], settings)
            if done < len(batches):
                yield from found
            done += 1

    def _complete(self, pieces: Sequence[Piece], settings: RolloutConfig) -> list[Completion]:
        """Samples of some groups or of parts of one, one after another."""
        prompts = [self._prompt(request.prompt) for request, _ in pieces]
        keys = [_key(request, i) for request, samples in pieces for i in samples]
        owners = [i for i, (_, samples) in enumerate(pieces) for _ in samples]
        uniforms = torch.stack([_uniforms(key, settings.max_tokens) for key in keys])
        with torch.no_grad(), self._autocast():
            return self.model(
                lambda network: generate(
                    network, prompts, owners, uniforms, self._settings(settings)
                )
            )

    def _settings(self, sampling: RolloutConfig) -> Settings:
        stops = tuple(sampling.stop)

        def stopped(ids: Sequence[int]) -> bool:
            tail = self._tokenizer.decode(ids[-STOP_WINDOW:])
            return any(stop in tail for stop in stops)

        return Settings(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            ends=self._ends,
            forbidden=self._forbidden,
            stopped=stopped if stops else None,
        )

    def _group(self, request: RolloutRequest, samples: tuple[Completion, ...]) -> RolloutGroup:
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        finished = torch.tensor([sample.finished for sample in samples])
        everything = torch.arange(int(lengths.max())) < lengths[:, None]
        dropped = ~finished[:, None] & self.config.rollout.drop_overlong
        decode, prompt = self._tokenizer.decode, self._prompt(request.prompt)
        return RolloutGroup(
            request=request,
            outputs=[decode(sample.ids, skip_special_tokens=True) for sample in samples],
            payload=Completions(prompt=prompt, samples=samples),
            mask=everything & ~dropped,
            everything=everything,
            truncated=~finished,
            tokens=[sample.ids for sample in samples],
            metrics=statistics(samples, len(prompt.ids)),
        )

    def _prompt(self, prompt: Prompt) -> Encoded:
        if prompt.id not in self._prompts:
            raise ValueError(f"prompt {prompt.text!r} was not among those given to build()")
        return self._prompts[prompt.id]

    def save_samples(self, payload: Completions) -> dict[str, Tensor]:
        """Tokens and log-probabilities of all samples, one after another, and their ``lengths``."""
        samples = payload.samples
        return {
            "lengths": torch.tensor([len(sample.ids) for sample in samples]),
            "ids": torch.tensor([token for sample in samples for token in sample.ids]),
            "logp": torch.tensor([x for s in samples for x in s.logp], dtype=torch.float64),
            "finished": torch.tensor([sample.finished for sample in samples]),
        }

    def load_samples(self, request: RolloutRequest, tensors: Mapping[str, Tensor]) -> Completions:
        """Inverse of ``save_samples``; the prompt is encoded again if it is no longer held."""
        lengths = tensors["lengths"].tolist()
        ids, logp = (tensors[name].split(lengths) for name in ("ids", "logp"))
        finished = tensors["finished"].tolist()
        samples = tuple(
            Completion(ids=i.tolist(), logp=x.tolist(), finished=end)
            for i, x, end in zip(ids, logp, finished, strict=True)
        )
        return Completions(prompt=self._prompt(request.prompt), samples=samples)

    # Update

    def collate(
        self, rows: Sequence[tuple[RolloutGroup, int]], decisions: slice = slice(None)
    ) -> tuple[Any, Tensor]:
        """Token ids of samples, and a mask as wide as the widest of their groups'."""
        assert decisions in (slice(None), slice(0, None)), "tokens are evaluated together"
        samples = [(group.payload.prompt, group.payload.samples[index]) for group, index in rows]
        payload = [Row(prompt=p, completion=s.ids, logp_sampled=s.logp) for p, s in samples]
        masks = [group.mask[index] for group, index in rows]
        return payload, side_by_side(masks)

    def evaluate(self, batch: UpdateBatch, needs: frozenset[str]) -> PolicyTerms:
        """logp [B, K] float32, and what ``needs`` asks for; metric ``entropy``, nats per token."""
        reference = self._reference_logp(batch) if "logp_ref" in needs else None
        asked = "entropy" in needs
        found = self._score(
            batch,
            with_entropy=True,
            entropy_slope=asked,
            # Without a memory the present policy is the one that sampled.
            second_temperature=_second_temperature(batch, needs) if batch.memory is None else None,
            with_sum_squares="sum_squares" in needs,
        )
        assert found.entropy is not None, "it was asked for"
        tempered = found.tempered
        if batch.memory is not None and "logp_tempered" in needs:
            tempered = side_by_side(list(batch.memory), batch.mask.shape[1])
        return PolicyTerms(
            logp=found.logp,
            entropy=found.entropy if asked else None,
            logp_ref=reference,
            logp_sampled=_sampled(batch) if "logp_sampled" in needs else None,
            logp_tempered=tempered,
            sum_squares=found.sum_squares,
            # A regulariser may add the same numbers again, which leaves the mean as it is.
            metrics=tallies({"entropy": found.entropy}, batch.mask, batch.weights),
        )

    @torch.no_grad()
    def anchor(self, batch: UpdateBatch, needs: frozenset[str]) -> list[Anchor]:
        """logp [K] of each row, and in ``memory`` that at the second temperature, if needed."""
        found = self._score(batch, second_temperature=_second_temperature(batch, needs))
        memory = [None] * len(found.logp) if found.tempered is None else found.tempered
        return [Anchor(logp=x, memory=m) for x, m in zip(found.logp, memory, strict=True)]

    def _score(self, batch: UpdateBatch, *, with_entropy: bool = False, **wanted: Any) -> Scored:
        config = self.config
        with self._autocast():
            return self.model(
                lambda network: score_rows(
                    network,
                    batch.payload,
                    batch.mask.shape[1],
                    how=config.update,
                    temperature=config.rollout.temperature,
                    chunk=config.chunk(network.config.get_text_config().vocab_size),
                    with_entropy=with_entropy,
                    **wanted,
                    attention=self.attention.name,
                )
            )

    @torch.no_grad()
    def _reference_logp(self, batch: UpdateBatch) -> Tensor:
        """Under the model as it was loaded."""
        if self.config.model.lora is not None:
            with adapters_off(self._network):
                return self._score(batch).logp
        self._take_copies()
        assert self._reference is not None, "build() was told that nothing needs it"
        with self._reference.applied(trainable(self._network)):
            try:
                return self._score(batch).logp
            finally:
                reshard(self._network)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self._network, self._dtype)

    # Weights

    def behaviour(self) -> AbstractContextManager[None]:
        """The policy samples itself."""
        return nullcontext()

    def averaged(self) -> AbstractContextManager[None]:
        """There is no average."""
        return nullcontext()

    def after_update(self, step: int) -> None:
        """Nothing moves."""

    def auxiliary_state(self) -> dict[str, Tensor]:
        """The reference of full fine-tuning, whole and on the CPU."""
        self._take_copies()
        return {} if self._reference is None else self._reference.state()

    def load_auxiliary_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``auxiliary_state``; ``ValueError`` if it belongs to other parameters."""
        self._take_copies()
        if self._reference is not None:
            self._reference.load(state)

    def _take_copies(self) -> None:
        """Copy the initial weights, once, after sharding may have replaced the parameters."""
        if self._keeps_reference and self._reference is None:
            self._reference = Snapshot(trainable(self._network))

    def export(self, folder: Path, card: str) -> None:
        """A model folder or a peft adapter, with the tokenizer, for ``from_pretrained``."""
        folder.mkdir(parents=True, exist_ok=True)
        network = self._network
        reshard(network)
        if self.config.model.lora is None:
            # Without other names of tied weights; loading ties them again.
            buffers = {k: v for k, v in network.named_buffers() if k in network.state_dict()}
            state = whole({**dict(network.named_parameters()), **buffers})
            network.save_pretrained(folder, state_dict=state)
        else:
            self._export_adapter(folder, whole(trainable(network)))
            if network.generation_config is not None:
                network.generation_config.save_pretrained(folder)
        self._saved.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _export_adapter(self, folder: Path, trained: dict[str, Tensor]) -> None:
        from peft.utils import get_peft_model_state_dict
        from safetensors.torch import save_file

        network = self._network
        state = get_peft_model_state_dict(network, state_dict=trained, adapter_name=ADAPTER)
        named = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
        save_file(named, folder / "adapter_model.safetensors")
        about = copy(network.peft_config[ADAPTER])
        about.base_model_name_or_path = self.config.model.path
        about.task_type = "CAUSAL_LM"
        about.save_pretrained(str(folder))


STOP_WINDOW = 64
"""Last tokens of a completion in which a stop text is looked for."""


def build(
    config: Config,
    *,
    device: torch.device,
    prompts: Sequence[Prompt],
    seed: int,
    needs: frozenset[str],
) -> TextBackend:
    """Load tokenizer and network, encode all ``prompts``.

    ``needs``: terms that ``evaluate`` will be asked for.  ``seed`` starts the adapter.
    ``UserError`` for a model or a chat template that is missing, a prompt or a demonstration that
    is too long, an
    attention kernel that does not run on ``device``, or a network that is scored otherwise than it
    samples.
    """
    tokenizer = load_tokenizer(config.model.path)
    network = load_network(config, seed, device)
    attention = choose(config, Heads.of(network), device)
    encoded = encode(tokenizer, prompts, config.prompts, room_for_prompts(network, config))
    with autocast(network, DTYPES[config.model.dtype]):
        refuse_wrong_scores(network, config, next(iter(encoded.values())), attention.name)
    return TextBackend(
        config,
        network,
        tokenizer,
        encoded,
        keeps_reference="logp_ref" in needs,
        attention=attention,
        demonstrations=encode_demonstrations(tokenizer, prompts, config.rollout),
    )


def room_for_prompts(network: Any, config: Config) -> Room:
    """What a prompt may have, so that the longest completion finds positions after it.

    ``UserError`` if that leaves none.
    """
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    completion = config.rollout.max_tokens
    room = (positions or 1 << 30) - completion
    if room < 1:
        raise UserError(
            f"backend.rollout.max_tokens = {completion} leaves no room for prompts: this "
            f"model has {positions} positions; allowed: less than that"
        )
    if config.prompts.max_tokens is not None and config.prompts.max_tokens <= room:
        return Room(config.prompts.max_tokens, "backend.prompts.max_tokens")
    why = f"the model's {positions} positions less backend.rollout.max_tokens = {completion}"
    return Room(room, why)


def autocast(network: Any, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Arithmetic in ``dtype``, where that is not float32."""
    # No cache: it would keep half-precision copies of weights that were swapped.
    half = dtype != torch.float32
    return torch.autocast(device_of(network).type, dtype, enabled=half, cache_enabled=False)


def _notes(config: Config, attention: Availability, forbidden: Sequence[int]) -> tuple[str, ...]:
    notes = [
        f"update: {config.update}",
        f"attention: {attention.name} ({attention.reason})",
    ]
    if config.demonstrations is not None:
        notes.append(f"trained on demonstrations: the column {config.demonstrations!r}")
    if config.rollout.truncates:
        notes.append(
            f"rollout.top_k = {config.rollout.top_k}, top_p = {config.rollout.top_p}: samples come "
            "from another distribution than the one that is trained"
        )
    if forbidden:
        notes.append(
            f"{len(forbidden)} tokens that stand for images and videos are never sampled: where "
            "the model gives them probability, samples come from another distribution than the "
            "one that is trained"
        )
    return tuple(notes)


Piece = tuple[RolloutRequest, range]
"""Some samples of a group."""


def _batches(requests: Sequence[RolloutRequest], rows: int) -> Iterator[list[Piece]]:
    """Consecutive groups of at most ``rows`` samples together; only larger ones are cut."""
    batch: list[Piece] = []
    filled = 0
    for request in requests:
        size = request.group_size
        for start in range(0, size, rows):
            piece = range(start, min(start + rows, size))
            if filled + len(piece) > rows:
                yield batch
                batch, filled = [], 0
            batch.append((request, piece))
            filled += len(piece)
    if batch:
        yield batch


def _second_temperature(batch: UpdateBatch, needs: frozenset[str]) -> float | None:
    if "logp_tempered" not in needs:
        return None
    assert batch.tempering is not None, "whoever needs it says at which temperature"
    return batch.tempering.temperature


def _sampled(batch: UpdateBatch) -> Tensor:
    """[B, K] float32: with what log-probability each token was sampled."""
    logp = torch.zeros(batch.mask.shape)
    for row, values in zip(logp, batch.payload, strict=True):
        row[: len(values.logp_sampled)] = torch.tensor(values.logp_sampled)
    return logp.to(batch.mask.device)


def _key(request: RolloutRequest, index: int) -> NoiseKey:
    return NoiseKey(
        seed=request.seed,
        stream=request.stream,
        prompt_id=request.prompt.id,
        sample=request.first_sample + index,
    )


def _uniforms(key: NoiseKey, count: int) -> Tensor:
    """[count] float64 in [0, 1): one for each token of a sample."""
    return torch.rand(count, generator=key.generator("tokens"), dtype=torch.float64)
