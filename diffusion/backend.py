"""Flow-matching image models on diffusers, with the flow-matching likelihood of AWM.

A sample is its clean latent x0.  Its decisions are noise levels t with their noise eps; both follow
from (seed, step, prompt, sample), so every evaluation of a sample (policy, reference, average,
behaviour policy, later epochs) sees the same draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import noise, schedule
from diffusion.attention import Availability, apply_attention, pick_attention
from diffusion.config import DTYPES, Config, RolloutConfig
from diffusion.estimate import describe, estimate_memory
from diffusion.likelihoods import (
    draw_times,
    interpolate,
    mean_square,
    surrogate_logp,
    velocity_error,
)
from diffusion.lora import ADAPTER, adapters_off, prepare_weights
from diffusion.models.base import Condition, locate, quiet_libraries
from diffusion.noise import NoiseKey
from diffusion.weights import (
    Snapshot,
    ema_decay,
    evaluation_decay,
    reshard,
    trainable,
    whole,
)
from mmrl.resolve import resolve
from mmrl.types import PolicyTerms, Prompt, RolloutGroup, RolloutRequest, UpdateBatch

PAPER = "Xue et al. 2025, arXiv:2509.25050"
__all__ = ["PAPER", "Config", "DiffusionBackend", "build", "describe", "estimate_memory"]


@dataclass(frozen=True, kw_only=True)
class CleanLatents:
    """Payload of a group: ``x0`` [G, C, h, w] float32 on the CPU, as sampled."""

    x0: Tensor


@dataclass(frozen=True, kw_only=True)
class FlowBatch:
    """Payload of a micro-batch: ``x0`` [B, C, h, w], ``times`` [B, K], and whose noise is whose."""

    x0: Tensor
    times: Tensor
    keys: tuple[NoiseKey, ...]


@dataclass(frozen=True, kw_only=True)
class NoisyRows:
    """K levels of B samples folded into one batch: row k B + b is level k of sample b."""

    x0: Tensor
    noise: Tensor
    times: Tensor
    noisy: Tensor
    condition: Condition


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
    ) -> None:
        """``conditions``: encoded prompts by prompt id; "" is the empty prompt of guidance."""
        self.config = config
        self.attention = attention
        self.notes = (f"attention: {attention.name} ({attention.reason})",)
        self.model: nn.Module = family.transformer
        self.off_policy = config.likelihood.behaviour == "ema"
        self._bare: Any = family.transformer
        self._architecture: Any = type(family.transformer)  # sharding changes the class in place
        self._family = family
        self._conditions = conditions
        self._device: torch.device = family.device
        self._dtype = DTYPES[config.model.dtype]
        self._shape = family.latent_shape(config.rollout.height, config.rollout.width)
        self._wanted = _wanted_copies(config, needs)
        self._copies: dict[str, Snapshot] = {}

    def rollout(
        self, requests: Sequence[RolloutRequest], *, evaluation: bool = False
    ) -> Iterator[RolloutGroup]:
        """Yield one group for each request, in order; forwards run across group borders."""
        self._take_copies()
        keys = [_key(request, index) for request in requests for index in range(request.group_size)]
        samples = self._samples(keys, self.config.sampling(evaluation=evaluation))
        for request in requests:
            latents, images = zip(*(next(samples) for _ in range(request.group_size)), strict=True)
            mask = torch.ones(request.group_size, self.config.likelihood.num_times).bool()
            payload = CleanLatents(x0=torch.stack(latents))
            yield RolloutGroup(request=request, outputs=images, payload=payload, mask=mask)

    def collate(self, rows: Sequence[tuple[RolloutGroup, int]]) -> tuple[FlowBatch, Tensor]:
        """Payload and an all-true mask [B, K]."""
        times = torch.stack([self._times(_key(group.request, index)) for group, index in rows])
        payload = FlowBatch(
            x0=torch.stack([group.payload.x0[index] for group, index in rows]),
            times=times,
            keys=tuple(_key(group.request, index) for group, index in rows),
        )
        return payload, torch.ones_like(times, dtype=torch.bool)

    def evaluate(self, batch: UpdateBatch, needs: frozenset[str]) -> PolicyTerms:
        """logp [B, K] float64 and what ``needs`` asks for, all at the same (t, eps)."""
        payload: FlowBatch = batch.payload
        rows = self._noisy_rows(payload)
        # Other weights are swapped in and out before the policy builds its graph on the live ones.
        others = self._other_velocities(rows, needs)
        velocity = self._velocity(rows.noisy, rows.times, rows.condition)

        def fold(value: Tensor) -> Tensor:
            return value.view(payload.times.shape[::-1]).T

        likelihood = self.config.likelihood
        error = velocity_error(velocity, rows.x0, rows.noise)
        logp = surrogate_logp(error, rows.times, likelihood.weighting, likelihood.ghuber_power)
        gaps = {name: fold(mean_square(velocity, other)) for name, other in others.items()}
        norms = {name: fold(_norm(other)) for name, other in others.items()}
        return PolicyTerms(
            logp=fold(logp),
            sigma=fold(rows.times),
            metrics=_norm_metrics(fold(_norm(velocity)), norms, batch.weights),
            **gaps,
        )

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
            decay = ema_decay(step, likelihood.ema.max_decay, likelihood.ema.rate)
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
        """Inverse of ``auxiliary_state``; ``ValueError`` if a copy is missing or unknown."""
        self._take_copies()
        found = {key.split(":", 1)[0] for key in state}
        if found != self._copies.keys():
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
            network.load_state_dict(whole(self._bare.state_dict()), assign=True)
            network.save_pretrained(folder / "transformer")
            return
        from peft.utils import get_peft_model_state_dict

        state = whole(get_peft_model_state_dict(self._bare, adapter_name=ADAPTER))
        lora = self._bare.peft_config[ADAPTER].to_dict()
        resolve("models", self.config.model.family).save_lora(folder, state, lora)

    # Sampling

    def _samples(
        self, keys: Sequence[NoiseKey], sampling: RolloutConfig
    ) -> Iterator[tuple[Tensor, Any]]:
        """Clean latent [C, h, w] on the CPU and image, one pair for each key."""
        for start in range(0, len(keys), sampling.batch_size):
            batch = keys[start : start + sampling.batch_size]
            latents = self._denoise(batch, sampling)
            yield from zip(latents.cpu(), self._family.decode(latents), strict=True)

    @torch.no_grad()
    def _denoise(self, keys: Sequence[NoiseKey], sampling: RolloutConfig) -> Tensor:
        """Clean latents [B, C, h, w] float32."""
        self.model.eval()
        sigmas = schedule.sigma_grid(sampling.grid, sampling.num_steps, sampling.shift)
        scheduler = schedule.build_scheduler(sampling.scheduler, sigmas, sampling.noise_level)
        generators = [key.generator("sampler") for key in keys]
        latents = noise.normal(keys, "initial", self._shape).to(self._device)
        condition = self._condition([key.prompt_id for key in keys])
        for index, sigma in enumerate(sigmas[:-1].tolist()):
            velocity = self._guided(latents, sigma, condition, sampling.guidance)
            latents = schedule.step(scheduler, index, velocity, latents, generators)
        return latents

    def _guided(
        self, latents: Tensor, sigma: float, condition: Condition, guidance: float
    ) -> Tensor:
        """Velocity with classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""
        times = torch.full((len(latents),), sigma, device=self._device)
        if guidance == 1.0:
            return self._velocity(latents, times, condition)
        empty = self._condition([""] * len(latents))
        both = Condition.stack([empty, condition], self._device)
        doubled = self._velocity(latents.repeat(2, 1, 1, 1), times.repeat(2), both)
        without, with_prompt = doubled.chunk(2)
        return without + guidance * (with_prompt - without)

    def _velocity(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """float32 velocity of ``self.model``, which accelerate may have wrapped."""
        # No autocast cache: it would keep half-precision copies of weights that were swapped.
        with torch.autocast(
            self._device.type,
            self._dtype,
            enabled=self._dtype != torch.float32,
            cache_enabled=False,
        ):
            return self._family.velocity(self.model, latents, times, condition)

    def _condition(self, prompt_ids: Sequence[str]) -> Condition:
        missing = sorted(set(prompt_ids) - self._conditions.keys())
        if missing:
            raise ValueError(f"prompts {missing[:3]} were not among those given to build()")
        return Condition.stack([self._conditions[name] for name in prompt_ids], self._device)

    # Likelihood

    def _times(self, key: NoiseKey) -> Tensor:
        """Noise levels [K] of a sample, the same for all that share them."""
        likelihood, rollout = self.config.likelihood, self.config.rollout
        scope: dict[str, list[str | int]] = {
            "step": [],
            "group": [key.prompt_id],
            "sample": [key.prompt_id, key.sample],
        }
        grid = schedule.sigma_grid(rollout.grid, rollout.num_steps, rollout.shift)
        return draw_times(
            likelihood.time_sampler,
            noise.generator(key.seed, key.stream, "times", *scope[likelihood.times_shared_by]),
            likelihood.num_times,
            grid=grid[:-1].tolist(),
            fraction=likelihood.timestep_fraction,
            shift=likelihood.shift,
        )

    def _noisy_rows(self, payload: FlowBatch) -> NoisyRows:
        num_times = payload.times.shape[1]
        eps = noise.normal(payload.keys, "likelihood", (num_times, *self._shape))
        eps = eps.transpose(0, 1).flatten(0, 1).to(self._device)
        x0 = payload.x0.to(self._device).repeat(num_times, 1, 1, 1)
        times = payload.times.T.flatten().to(self._device)
        condition = self._condition([key.prompt_id for key in payload.keys])
        return NoisyRows(
            x0=x0,
            noise=eps,
            times=times,
            noisy=interpolate(x0, eps, times),
            condition=condition.repeat(num_times),
        )

    @torch.no_grad()
    def _other_velocities(self, rows: NoisyRows, needs: frozenset[str]) -> dict[str, Tensor]:
        """Velocities of the reference and of phi, under the names of their gaps."""
        weights = {"velocity_gap_reference": self._reference, "velocity_gap_ema": self._ema}
        found = {}
        for name in sorted(needs & weights.keys()):
            with weights[name]():
                found[name] = self._velocity(rows.noisy, rows.times, rows.condition)
        return found

    # Weights

    def _reference(self) -> AbstractContextManager[None]:
        """The model as it was loaded."""
        lora = self.config.model.lora is not None
        return adapters_off(self._bare) if lora else self._with_copy("reference")

    def _ema(self) -> AbstractContextManager[None]:
        return self._with_copy("ema")

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

    ``needs``: terms that ``evaluate`` will be asked for; unneeded copies of weights are not kept.
    ``seed`` starts the adapter.  ``UserError`` for a missing model or an attention kernel that does
    not run on ``device``.
    """
    quiet_libraries()
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
    apply_attention(family.transformer, attention.name)
    return DiffusionBackend(config, family, conditions, needs=needs, attention=attention)


def _encode(family: Any, prompts: Sequence[Prompt], config: Config) -> dict[str, Condition]:
    """Encoded prompts by id; equal texts are encoded once and shared."""
    guidance = max(config.sampling(evaluation=e).guidance for e in (False, True))
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
    wanted = {
        "ema": "velocity_gap_ema" in needs or likelihood.behaviour == "ema",
        "average": likelihood.evaluation_ema_decay is not None,
        "reference": "velocity_gap_reference" in needs and config.model.lora is None,
    }
    return frozenset(name for name, used in wanted.items() if used)


def _key(request: RolloutRequest, index: int) -> NoiseKey:
    return NoiseKey(
        seed=request.seed, stream=request.stream, prompt_id=request.prompt.id, sample=index
    )


def _norm(velocity: Tensor) -> Tensor:
    """Mean over latent dimensions of v^2, detached, float64 [rows]."""
    return mean_square(velocity.detach(), torch.zeros_like(velocity))


def _norm_metrics(
    norm: Tensor, others: dict[str, Tensor], weights: Tensor
) -> dict[str, tuple[float, float]]:
    """(sum, count) of mean v^2 [B, K], and of its ratio to the reference where that was computed.

    A ratio that grows is the first sign of collapse under negative advantages.
    """
    weights = weights.to(norm).unsqueeze(1).expand_as(norm)
    count = float(weights.sum())
    found = {"velocity_norm": (float((weights * norm).sum()), count)}
    if "velocity_gap_reference" in others:
        ratio = norm / others["velocity_gap_reference"].clamp_min(1e-12)
        found["velocity_norm_ratio"] = (float((weights * ratio).sum()), count)
    return found
