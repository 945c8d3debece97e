"""Flow-matching image models on diffusers, under one of two likelihoods.

``flow_matching`` scores noise levels of the clean sample (AWM, DiffusionNFT); ``transition`` scores
the steps of a stochastic sampler (Flow-GRPO, GRPO-Guard, DiffusionOPD).  All noise follows from
(seed, step, prompt, sample), so every evaluation of a sample sees the same draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import sampling
from diffusion.attention import Availability, pick_attention
from diffusion.config import Config, FlowMatchingConfig
from diffusion.decisions import OTHER_POLICIES, Decisions, Rows
from diffusion.estimate import describe, estimate_memory
from diffusion.likelihoods import mean_square
from diffusion.lora import prepare_weights
from diffusion.matching import CleanLatents, FlowMatching
from diffusion.models.base import Condition, locate, quiet_libraries
from diffusion.teachers import Teachers, compare_with_runs
from diffusion.transition import Transition
from mmrl.adapters import ADAPTER, adapters_off
from mmrl.noise import NoiseKey
from mmrl.resolve import resolve
from mmrl.types import (
    DTYPES,
    Anchor,
    PolicyTerms,
    Prompt,
    RolloutGroup,
    RolloutRequest,
    UpdateBatch,
)
from mmrl.weights import (
    Snapshot,
    ema_decay,
    evaluation_decay,
    reshard,
    trainable,
    whole,
)

PAPER = "Xue et al. 2025, arXiv:2509.25050; Liu et al. 2025, arXiv:2505.05470"
__all__ = ["PAPER", "Config", "DiffusionBackend", "build", "describe", "estimate_memory"]


class DiffusionBackend:
    """See ``mmrl.backend.Backend``."""

    def __init__(
        self,
        config: Config,
        family: Any,
        conditions: dict[str, Condition],
        *,
        needs: frozenset[str],
        attention: Availability,
        teachers: Teachers | None = None,
    ) -> None:
        """``conditions``: encoded prompts by prompt id; "" is the empty prompt of guidance."""
        self.config = config
        self.attention = attention
        kernel = f"attention: {attention.name} ({attention.reason})"
        self.notes = (kernel, *_grid_notes(config, family))
        self.model: nn.Module = family.transformer
        self.off_policy = config.likelihood.behaviour == "ema"
        self._bare: Any = family.transformer
        self._architecture: Any = type(family.transformer)  # sharding changes the class in place
        self._family = family
        self._conditions = conditions
        self._device: torch.device = family.device
        self._dtype = DTYPES[config.model.dtype]
        self._shape = family.latent_shape(config.rollout.height, config.rollout.width)
        self._decisions = _decisions(config)
        self._teachers = teachers
        self._wanted = _wanted_copies(config, needs)
        self._copies: dict[str, Snapshot] = {}

    def rollout(
        self, requests: Sequence[RolloutRequest], *, evaluation: bool = False
    ) -> Iterator[RolloutGroup]:
        """Yield one group for each request, in order; forwards run across group borders."""
        self._take_copies()
        keys = [_key(request, index) for request in requests for index in range(request.group_size)]
        samples = self._samples(keys, evaluation)
        for request in requests:
            rows = [next(samples) for _ in range(request.group_size)]
            records, images, logp = zip(*rows, strict=True)
            pack = CleanLatents.pack if evaluation else self._decisions.pack
            mask = torch.ones(request.group_size, self._decisions.num_decisions).bool()
            yield RolloutGroup(
                request=request,
                outputs=images,
                payload=pack(records),
                mask=mask,
                logp_old=None if logp[0] is None else torch.stack(logp),
            )

    def save_samples(self, payload: Any) -> dict[str, Tensor]:
        """Clean latents, or the states of trained steps, on the CPU."""
        return self._decisions.save(payload)

    def load_samples(self, request: RolloutRequest, tensors: Mapping[str, Tensor]) -> Any:
        """Inverse of ``save_samples``.  All noise follows from ``request``, as ever."""
        del request
        return self._decisions.load(tensors)

    def collate(
        self, rows: Sequence[tuple[RolloutGroup, int]], decisions: slice = slice(None)
    ) -> tuple[Any, Tensor]:
        """Payload and an all-true mask [B, K] of the decisions asked for."""
        keyed = [(group.payload, index, _key(group.request, index)) for group, index in rows]
        mask = torch.stack([group.mask[index, decisions] for group, index in rows])
        return self._decisions.collate(keyed, decisions), mask

    def evaluate(self, batch: UpdateBatch, needs: frozenset[str]) -> PolicyTerms:
        """logp [B, K] float64 and what ``needs`` asks for, all at the same states."""
        rows = self._decisions.fold(batch.payload, self._device)
        # Other weights are swapped in and out before the policy builds its graph on the live ones.
        others = self._other_velocities(rows, needs)
        if batch.memory is not None and "mean_gap_old" in needs:
            others["old"] = torch.stack(list(batch.memory), dim=1).flatten(0, 1).to(self._device)
        velocity = self._policy(rows)
        terms = self._decisions.terms(rows, velocity, others, needs)
        reference = others.get("reference")
        return PolicyTerms(
            **{name: rows.unfold(value) for name, value in terms.items()},
            metrics=_norm_metrics(
                rows.unfold(_norm(velocity)),
                None if reference is None else rows.unfold(_norm(reference)),
                batch.weights,
            ),
        )

    @torch.no_grad()
    def anchor(self, batch: UpdateBatch, needs: frozenset[str]) -> list[Anchor]:
        """logp of each row, and its velocities [K, C, h, w] on the CPU where means are compared."""
        rows = self._decisions.fold(batch.payload, self._device)
        velocity = self._policy(rows)
        logp = self._decisions.terms(rows, velocity, {}, frozenset())["logp"]
        memory: Any = [None] * len(rows.keys)
        if "mean_gap_old" in needs:
            memory = rows.unfold(velocity).cpu()
        return [Anchor(logp=x, memory=m) for x, m in zip(rows.unfold(logp), memory, strict=True)]

    def behaviour(self) -> AbstractContextManager[None]:
        """Within it the weights are those that sample: phi if the run is off-policy."""
        return self._with_copy("ema") if self.off_policy else nullcontext()

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the weights are the average for evaluation and export, if there is one."""
        return self._with_copy("average") if "average" in self._wanted else nullcontext()

    def after_update(self, step: int) -> None:
        """Move phi and the evaluation average towards the policy."""
        self._take_copies()
        likelihood, live = self.config.likelihood, trainable(self._bare)
        if "ema" in self._copies:
            ema = likelihood.ema
            decay = ema_decay(step, ema.max_decay, ema.rate, ema.start)
            self._copies["ema"].move_towards(live, decay)
        if "average" in self._copies:
            assert likelihood.evaluation_ema_decay is not None
            decay = evaluation_decay(step, likelihood.evaluation_ema_decay)
            self._copies["average"].move_towards(live, decay)

    def auxiliary_state(self) -> dict[str, Tensor]:
        """Every copy of the weights, as ``copy:parameter``.

        Whole tensors on the CPU: sharded ones are gathered, so every process must call this.
        """
        self._take_copies()
        return {
            f"{copy}:{name}": value
            for copy, snapshot in self._copies.items()
            for name, value in snapshot.state().items()
        }

    def load_auxiliary_state(self, state: dict[str, Tensor]) -> None:
        """Inverse of ``auxiliary_state``; ``ValueError`` if a copy is missing.

        What this backend does not hold, since it was built with fewer ``needs``, is left out.
        """
        self._take_copies()
        found = {key.split(":", 1)[0] for key in state}
        if not self._copies.keys() <= found:
            raise ValueError(f"saved copies {sorted(found)}, expected {sorted(self._copies)}")
        for copy, snapshot in self._copies.items():
            prefix = f"{copy}:"
            mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            snapshot.load(mine)

    def export(self, folder: Path, card: str) -> None:
        """LoRA: ``pytorch_lora_weights.safetensors``; else a ``transformer`` folder; and a card.

        Sharded parameters are gathered, so every process must call this.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(card, encoding="utf-8")
        if self.config.model.lora is None:
            with torch.device("meta"):
                network = self._architecture.from_config(self._bare.config)
            state = {**self._bare.state_dict(), **trainable(self._bare)}  # and buffers
            network.load_state_dict(whole(state), assign=True)
            network.save_pretrained(folder / "transformer")
            return
        from peft.utils import get_peft_model_state_dict

        adapter = whole(trainable(self._bare))
        state = get_peft_model_state_dict(self._bare, state_dict=adapter, adapter_name=ADAPTER)
        lora = self._bare.peft_config[ADAPTER].to_dict()
        resolve("models", self.config.model.family).save_lora(folder, state, lora)

    # Sampling

    @torch.no_grad()
    def _samples(
        self, keys: Sequence[NoiseKey], evaluation: bool
    ) -> Iterator[tuple[Any, Any, Tensor | None]]:
        """Record, image and logp [K] (where sampling tells) of a sample, for each key."""
        settings = self.config.sampling(evaluation=evaluation)
        for start in range(0, len(keys), settings.batch_size):
            batch = keys[start : start + settings.batch_size]
            yield from self._draw(batch, evaluation)

    def _draw(
        self, keys: Sequence[NoiseKey], evaluation: bool
    ) -> Iterator[tuple[Any, Any, Tensor | None]]:
        self.model.eval()
        settings = self.config.sampling(evaluation=evaluation)
        latents = sampling.initial_noise(keys, self._shape, settings.initial_noise)
        latents = latents.to(self._device)
        velocity = self._velocity_for([key.prompt_id for key in keys], settings.guidance)
        logp: Any = [None] * len(keys)
        if evaluation:
            latents = sampling.integrate(keys, settings, velocity, latents)
            records = list(latents.cpu())
        else:
            drawn = self._decisions.draw(keys, velocity, latents)
            latents, records = drawn.latents, drawn.records
            logp = logp if drawn.logp is None else drawn.logp
        return zip(records, self._family.decode(latents), logp, strict=True)

    # Velocities

    def _policy(self, rows: Rows) -> Tensor:
        """float32 velocities [R, ...] of the policy that is trained."""
        return self._velocity(rows, self.config.rollout.guidance)

    def _velocity(self, rows: Rows, guidance: float, network: nn.Module | None = None) -> Tensor:
        ids = [key.prompt_id for key in rows.keys]
        if not (self._decisions.guided or self._family.embeds_guidance):
            guidance = 1.0
        velocity = self._velocity_for(ids, guidance, rows.num_decisions, network)
        return velocity(rows.states, rows.sigma)

    def _velocity_for(
        self,
        prompt_ids: Sequence[str],
        guidance: float,
        repeats: int = 1,
        network: nn.Module | None = None,
    ) -> sampling.Velocity:
        """Guided velocity of rows that belong to ``prompt_ids``, ``repeats`` times over.

        ``network``: another one than the trained.
        """
        condition = self._condition(prompt_ids).repeat(repeats)
        doubled = guidance != 1.0 and not self._family.embeds_guidance
        if doubled:
            empty = self._condition([""] * len(prompt_ids)).repeat(repeats)
            condition = Condition.stack([empty, condition], self._device)

        def ask(latents: Tensor, sigma: Tensor) -> Tensor:
            if not doubled:
                return self._ask(network, latents, sigma, condition, guidance)
            twice = latents.repeat(2, 1, 1, 1)
            both = self._ask(network, twice, sigma.repeat(2), condition, guidance)
            return self._family.guide(*both.chunk(2), guidance)

        return ask

    def _ask(
        self,
        network: nn.Module | None,
        latents: Tensor,
        sigma: Tensor,
        condition: Condition,
        guidance: float,
    ) -> Tensor:
        """float32 velocity of ``network``, or of ``self.model``, which accelerate may have wrapped.

        No autocast cache: it would keep half-precision copies of weights that were swapped.
        """
        with torch.autocast(
            self._device.type,
            self._dtype,
            enabled=self._dtype != torch.float32,
            cache_enabled=False,
        ):
            network = self.model if network is None else network
            return self._family.velocity(network, latents, sigma, condition, guidance)

    def _condition(self, prompt_ids: Sequence[str]) -> Condition:
        missing = sorted(set(prompt_ids) - self._conditions.keys())
        if missing:
            raise ValueError(f"prompts {missing[:3]} were not among those given to build()")
        return Condition.stack([self._conditions[name] for name in prompt_ids], self._device)

    @torch.no_grad()
    def _other_velocities(self, rows: Rows, needs: frozenset[str]) -> dict[str, Tensor]:
        """Velocities of other policies at the same states, by policy."""
        policies = {OTHER_POLICIES[name] for name in needs & OTHER_POLICIES.keys()}
        found = {}
        for policy in sorted(policies - {"teacher"}):
            with self._reference() if policy == "reference" else self._with_copy(policy):
                found[policy] = self._policy(rows)
        if "teacher" in policies:
            assert self._teachers is not None, "preflight refuses this"
            found["teacher"] = self._teachers.velocities(rows, self._velocity)
        return found

    # Weights

    def _reference(self) -> AbstractContextManager[None]:
        """The model as it was loaded."""
        lora = self.config.model.lora is not None
        return adapters_off(self._bare) if lora else self._with_copy("reference")

    @contextmanager
    def _with_copy(self, name: str) -> Iterator[None]:
        self._take_copies()
        if name not in self._copies:
            raise ValueError(f"no {name!r} copy of the weights was asked for in build(needs=...)")
        with self._copies[name].applied(trainable(self._bare)):
            try:
                yield
            finally:
                reshard(self._bare)  # else the next forward would still see the copy

    def _take_copies(self) -> None:
        """Copy the initial weights, once, after sharding may have replaced the parameters."""
        for name in sorted(self._wanted - self._copies.keys()):
            self._copies[name] = Snapshot(trainable(self._bare))


def build(
    config: Config,
    *,
    device: torch.device,
    prompts: Sequence[Prompt],
    seed: int,
    needs: frozenset[str],
) -> DiffusionBackend:
    """Load the pipeline, encode all ``prompts`` once, free the encoders, prepare the weights.

    ``needs``: terms that ``evaluate`` will be asked for; copies of weights and teachers that these
    do not need are not kept.  ``seed`` starts the adapter.  ``UserError`` for a missing model, a
    teacher that is missing or does not fit, or an attention kernel that does not run on ``device``.
    """
    quiet_libraries()
    is_taught = bool(config.teachers) and "mean_gap_teacher" in needs
    warnings = compare_with_runs(config) if is_taught else []
    folder = locate(config.model.path, weights=True)
    dtype = DTYPES[config.model.dtype]
    attention = pick_attention(config.model.attention, device, dtype)
    family_module = resolve("models", config.model.family)
    # Trained parameters must not pass through half precision on their way from the file.
    transformer_dtype = torch.float32 if config.model.lora is None else dtype
    family = family_module.load(folder, dtype, transformer_dtype, device)
    conditions = _encode(family, prompts, config)
    family.release_encoders()
    prepare_weights(family.transformer, config.model, family_module.LORA_TARGETS, seed)
    teachers = Teachers.load(config, family, prompts) if is_taught else None
    for network in (family.transformer, *(teachers.networks if teachers else ())):
        family.use_attention(attention.name, network)
    backend = DiffusionBackend(
        config, family, conditions, needs=needs, attention=attention, teachers=teachers
    )
    backend.notes = (*backend.notes, *warnings)
    return backend


def _grid_notes(config: Config, family: Any) -> list[str]:
    """Lines where the pipeline's scheduler would make another grid for this size of image."""
    rollout, notes = config.rollout, []
    own = family.shift(rollout.height, rollout.width)
    if own is not None and abs(own - rollout.shift) >= 1e-3 * own:
        notes.append(
            f"rollout.shift: {rollout.shift:g}; the pipeline's own for this size is {own:.5g}"
        )
    terminals = rollout.shift_terminal, family.shift_terminal
    if terminals[0] != terminals[1]:
        ours, own = ("null" if level is None else f"{level:g}" for level in terminals)
        notes.append(f"rollout.shift_terminal: {ours}; the pipeline's own is {own}")
    return notes


def _decisions(config: Config) -> Decisions:
    likelihood = config.likelihood
    if isinstance(likelihood, FlowMatchingConfig):
        return FlowMatching(config, likelihood)
    return Transition(config, likelihood)


def _encode(family: Any, prompts: Sequence[Prompt], config: Config) -> dict[str, Condition]:
    """Encoded prompts by id; equal texts are encoded once and shared."""
    taught = [teacher.guidance for teacher in config.teachers]
    guidance = max(*taught, *(config.sampling(evaluation=e).guidance for e in (False, True)))
    texts = {prompt.id: prompt.text for prompt in prompts}
    if guidance > 1.0:
        texts[""] = ""
    distinct = list(dict.fromkeys(texts.values()))
    encoded = family.encode(distinct, config.model.max_sequence_length)
    by_text = dict(zip(distinct, encoded, strict=True))
    return {prompt_id: by_text[text] for prompt_id, text in texts.items()}


def _wanted_copies(config: Config, needs: frozenset[str]) -> frozenset[str]:
    """Names of the copies of the weights that this run uses."""
    likelihood = config.likelihood
    compared = {OTHER_POLICIES[name] for name in needs & OTHER_POLICIES.keys()}
    wanted = {
        "ema": "ema" in compared or likelihood.behaviour == "ema",
        "average": likelihood.evaluation_ema_decay is not None,
        "reference": "reference" in compared and config.model.lora is None,
    }
    return frozenset(name for name, used in wanted.items() if used)


def _key(request: RolloutRequest, index: int) -> NoiseKey:
    return NoiseKey(
        seed=request.seed,
        stream=request.stream,
        prompt_id=request.prompt.id,
        sample=request.first_sample + index,
    )


def _norm(velocity: Tensor) -> Tensor:
    """Mean over latent dimensions of v^2, detached, float64 [rows]."""
    return mean_square(velocity.detach(), torch.zeros_like(velocity))


def _norm_metrics(
    norm: Tensor, reference: Tensor | None, weights: Tensor
) -> dict[str, tuple[float, float]]:
    """(sum, count) of mean v^2 [B, K], and of its ratio to the reference where that was computed.

    A ratio that grows is the first sign of collapse under negative advantages.
    """
    weights = weights.to(norm).unsqueeze(1).expand_as(norm)
    count = float(weights.sum())
    found = {"velocity_norm": (float((weights * norm).sum()), count)}
    if reference is not None:
        ratio = norm / reference.clamp_min(1e-12)
        found["velocity_norm_ratio"] = (float((weights * ratio).sum()), count)
    return found
