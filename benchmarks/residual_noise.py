"""How much noise do stochastic samplers leave in the final pictures?

    python -m benchmarks.residual_noise [--seeds 0 1 2 3 4] [a.b=value ...]

The untrained network draws the held-out prompts by every kernel from the same initial noise, once
for each seed.  *Grain*: noise deviation of the decoded grey picture, in grey levels of 255, by a
mask that no linear ramp passes (J. Immerkaer, "Fast Noise Variance Estimation", 1996), with the
median of the responses in place of their mean, so that strokes do not count.  *High-frequency
energy*: mean square response to the same mask in latent space, over that of the ODE; strokes count.
*Round trip*: root mean square distance of a latent from the encoding of its own picture, which
shows what the decoder hides.  White noise added to the ODE's latents shows what each can see.
Conditions differ in the grid of noise levels and in which steps add noise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks import judges, tables
from diffusion import sampling
from diffusion.backend import DiffusionBackend, build
from diffusion.likelihoods import mean_square
from mmrl import config as configuration
from mmrl.evaluation import spread
from mmrl.images import labelled_grid
from mmrl.noise import NoiseKey
from mmrl.prompts.dataset import load_prompts
from mmrl.types import Prompt
from rewards import ocr

KERNELS = {"ode": 0.0, "flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
"""Noise level of each kernel, as shipped."""

CALIBRATION = (0.05, 0.1, 0.2)
"""Deviations of white noise that is added to clean latents, which have about 1."""

NORMAL_QUARTILE = 0.6744897501960817
"""Median of |z|, z standard normal."""

MASK = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]])
"""Difference of two Laplacians; its squares sum to 36."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """``grid``: of ``diffusion.schedule``; ``noise``: of ``likelihood.steps``."""

    grid: str
    noise: str

    @property
    def name(self) -> str:
        return f"{self.grid}, noise on {self.noise} steps"


CONDITIONS = (
    Condition(grid="linspace_shifted", noise="trained"),
    Condition(grid="linspace_shifted", noise="all"),
    Condition(grid="diffusers_default", noise="trained"),
)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Means over one seed's pictures of what the module's head names; ``exact``: share read."""

    grain: float
    energy: float
    round_trip: float
    exact: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One kernel under one condition: each figure for each seed; ``energy`` is over the ODE's.

    ``last_std``: S of the noise that came last, in units of the latents.
    """

    condition: str
    kernel: str
    noise_level: float
    last_std: float
    grain: Sequence[float]
    energy: Sequence[float]
    round_trip: Sequence[float]
    exact: Sequence[float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, measure, print, write."""
    options = _parser().parse_args(arguments)
    truth = grain(_ground_truth_pixels()).mean()
    lines, pictures = calibrate(options), {}
    for condition in CONDITIONS:
        found, shown = measure(options, condition)
        lines += found
        pictures[condition] = shown
        print(condition.name, flush=True)
    about = tables.machine()
    markdown = report(lines, float(truth), options, about)
    data = {
        "machine": about,
        "seeds": options.seeds,
        "overrides": options.overrides,
        "grain_of_rendered_signs": float(truth),
        "lines": [asdict(line) for line in lines],
    }
    path = tables.write_results(options.out, "residual-noise", markdown, data)
    for condition, picture in pictures.items():
        name = f"{path.stem}-{condition.grid}-{condition.noise}.png"
        picture.save(path.with_name(name))
    print(f"{markdown}\n\nwritten to {path}")
    return 0


# Drawing


def measure(options: argparse.Namespace, condition: Condition) -> tuple[list[Line], Image.Image]:
    """One line for each kernel, and a picture of the first seed's samples."""
    prompts = held_out(options)
    shown = sorted(spread(len(prompts), options.shown))
    lines, found, columns = [], {}, {}
    for kernel, level in KERNELS.items():
        backend = open_backend(options, condition, kernel, level, prompts)
        draws = [draw(backend, prompts, seed) for seed in options.seeds]
        found[kernel] = [figures(backend, prompts, latents) for latents in draws]
        columns[kernel] = backend._family.decode(draws[0][shown])
        std = last_std(backend)
        lines.append(line_of(condition.name, kernel, level, std, found[kernel], found["ode"]))
    picture = labelled_grid(
        [list(images) for images in zip(*columns.values(), strict=True)],
        [prompts[index].text for index in shown],
        columns=list(columns),
        title=condition.name,
        cell_width=256,
    )
    return lines, picture


def calibrate(options: argparse.Namespace) -> list[Line]:
    """The ODE's latents of the first condition with white noise of known deviation added."""
    prompts = held_out(options)
    backend = open_backend(options, CONDITIONS[0], "ode", 0.0, prompts)
    draws = [draw(backend, prompts, seed) for seed in options.seeds]
    clean = [figures(backend, prompts, latents) for latents in draws]
    generator = torch.Generator().manual_seed(0)
    lines = []
    for std in CALIBRATION:
        noisy = [z + std * torch.randn(z.shape, generator=generator).to(z) for z in draws]
        found = [figures(backend, prompts, latents) for latents in noisy]
        lines.append(line_of("calibration", "ode + white noise", std, std, found, clean))
    return lines


def line_of(
    condition: str,
    kernel: str,
    noise_level: float,
    last_std: float,
    drawn: Sequence[Drawn],
    ode: Sequence[Drawn],
) -> Line:
    """The figures of every seed; ``ode``: of the same seeds."""
    return Line(
        condition=condition,
        kernel=kernel,
        noise_level=noise_level,
        last_std=last_std,
        grain=[d.grain for d in drawn],
        energy=[d.energy / o.energy for d, o in zip(drawn, ode, strict=True)],
        round_trip=[d.round_trip for d in drawn],
        exact=[d.exact for d in drawn],
    )


def held_out(options: argparse.Namespace) -> list[Prompt]:
    """Evaluation prompts, evenly spread over the file."""
    run = configuration.load(options.config, options.overrides)
    assert run.evaluation.source is not None, "the recipe has held-out prompts"
    prompts = load_prompts(run.evaluation.source, "evaluation.source")
    return [prompts[index] for index in sorted(spread(len(prompts), options.prompts))]


def open_backend(
    options: argparse.Namespace,
    condition: Condition,
    kernel: str,
    level: float,
    prompts: Sequence[Prompt],
) -> DiffusionBackend:
    """The base network in float32 (half precision would add a grain of its own)."""
    changes = [
        "backend.model.dtype=fp32",
        f"backend.rollout.grid={condition.grid}",
        f"backend.likelihood.kernel={kernel}",
        f"backend.likelihood.noise_level={level}",
        f"backend.likelihood.steps.noise={condition.noise}",
    ]
    run = configuration.load(options.config, [*options.overrides, *changes])
    config: Any = run.backend.config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return build(config, device=device, prompts=prompts, seed=0, needs=frozenset({"logp"}))


@torch.no_grad()
def draw(backend: DiffusionBackend, prompts: Sequence[Prompt], seed: int) -> Tensor:
    """Final latents [N, C, h, w], one for each prompt, as a training rollout draws them.

    The backend's own ``rollout`` keeps only the states of trained steps, not the final ones.
    """
    rollout = backend.config.rollout
    keys = [NoiseKey(seed=seed, stream=0, prompt_id=p.id, sample=0) for p in prompts]
    found = []
    for start in range(0, len(keys), rollout.batch_size):
        batch = keys[start : start + rollout.batch_size]
        latents = sampling.initial_noise(batch, backend._shape, "sample").to(backend._device)
        velocity = backend._velocity_for([key.prompt_id for key in batch], rollout.guidance)
        found.append(backend._decisions.draw(batch, velocity, latents).latents)
    return torch.cat(found)


def last_std(backend: DiffusionBackend) -> float:
    """S of the last step, 0 where that step follows the ODE."""
    likelihood: Any = backend.config.likelihood
    step_tables = backend.config.step_tables(likelihood)
    last = step_tables.num_steps - 1
    noisy = likelihood.steps.noisy(step_tables, likelihood.steps.candidates(step_tables))
    return float(step_tables.noisy.std[last]) if last in noisy else 0.0


@torch.no_grad()
def figures(backend: DiffusionBackend, prompts: Sequence[Prompt], latents: Tensor) -> Drawn:
    """Means over the samples of one seed."""
    pixels = backend._family.decode_pixels(latents).float()
    reader = ocr.build(ocr.Config(mode="exact"))
    read = reader(
        [prompt.text for prompt in prompts],
        backend._family.decode(latents),
        text=[prompt.columns.get("text") for prompt in prompts],
    )
    return Drawn(
        grain=float(grain(pixels).mean()),
        energy=float(high_frequency_energy(latents).mean()),
        round_trip=float(round_trip(backend._family._vae, latents, pixels).mean()),
        exact=float(read.nanmean()),
    )


# Measures


def grain(pixels: Tensor) -> Tensor:
    """Noise deviation [N] of pictures [N, 3, H, W] in [-1, 1], in grey levels of 255.

    Median of |response| over 6 x 0.6745: exact on average for white noise on any linear ramp, and
    untouched by edges while they cover less than half of the picture.  Not clipped to [-1, 1]: a
    saturated background would hide its noise.
    """
    grey = pixels.mean(dim=1, keepdim=True) * 127.5
    medians = mask_response(grey).abs().flatten(1).median(dim=1).values
    return medians / (6 * NORMAL_QUARTILE)


def high_frequency_energy(latents: Tensor) -> Tensor:
    """Mean square response [N] over channels and places of [N, C, h, w]; s^2 for white noise s."""
    return mask_response(latents).square().flatten(1).mean(dim=1) / 36


def round_trip(vae: Any, latents: Tensor, pixels: Tensor) -> Tensor:
    """Root mean square [N] of latents minus the encoding of their decoded ``pixels``."""
    mode = vae.encode(pixels.clamp(-1, 1)).latent_dist.mode()
    encoded = (mode - vae.config.shift_factor) * vae.config.scaling_factor
    return mean_square(latents, encoded).sqrt()


def mask_response(images: Tensor) -> Tensor:
    """Each channel of [N, C, H, W] under ``MASK``, without borders: [N, C, H - 2, W - 2]."""
    flat = images.flatten(0, 1).unsqueeze(1)
    response = conv2d(flat, MASK.to(images).view(1, 1, 3, 3))
    return response.unflatten(0, images.shape[:2]).squeeze(2)


def _ground_truth_pixels(count: int = 200) -> Tensor:
    """Rendered signs as the network's training data has them, in [-1, 1]."""
    images, _ = judges.ground_truth(count)
    pixels = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


# Report


def report(
    lines: Sequence[Line], truth: float, options: argparse.Namespace, about: dict[str, Any]
) -> str:
    """The whole result in markdown."""
    changes = f" with {' '.join(options.overrides)}" if options.overrides else ""
    sections = []
    for name in dict.fromkeys(line.condition for line in lines):
        chosen = [line for line in lines if line.condition == name]
        sections += [f"## {name}", table(chosen)]
    return "\n\n".join(
        [
            f"# Noise left in the samples of {options.config}{changes}",
            f"{len(options.seeds)} seeds, {options.prompts} held-out prompts (at most), one sample "
            "of each; mean over seeds of the mean over prompts, +- the standard deviation over "
            "seeds (n - 1). Same initial noise for all kernels; untrained network, float32.",
            *sections,
            "last S: noise that came last, in units of the latents. grain: in grey levels "
            f"of 255; rendered signs, which carry no noise: {truth:.2f}. high-freq.: energy of the "
            "final latents over the ODE's, strokes and all. round trip: distance of the latents "
            "from the encoding of their pictures. exact: share that rapidocr reads exactly. "
            "`trained` noise: every step but those without a usable density, such as the last.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def table(lines: Iterable[Line]) -> str:
    """One row for each kernel."""
    return tables.markdown_table(
        ["kernel", "noise level", "last S", "grain", "high-freq. / ODE", "round trip", "exact"],
        [
            [
                line.kernel,
                f"{line.noise_level:g}",
                f"{line.last_std:.3f}",
                _mean_and_std(line.grain, ".2f"),
                _mean_and_std(line.energy, ".3f"),
                _mean_and_std(line.round_trip, ".4f"),
                _mean_and_std(line.exact, ".3f"),
            ]
            for line in lines
        ],
    )


def _mean_and_std(values: Sequence[float], form: str) -> str:
    found = tables.spread(values)
    assert found is not None, "there is at least one seed"
    return f"{found.mean:{form}} +- {tables.cell(found.std, form)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.residual_noise")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/diffusion/tiny-sd3/flow-grpo.yaml"))
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--prompts", type=int, default=92, help="held-out prompts, evenly spread")
    add("--shown", type=int, default=4, help="prompts in the pictures")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("overrides", nargs="*", help="a.b=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
