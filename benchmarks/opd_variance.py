"""How noisy is the gradient of on-policy distillation, in closed form and in PPO's form?

    python -m benchmarks.opd_variance [--seeds 0 1 2 3 4] [--draws 128] [a.b=value ...]

Both minimise KL(student || teacher) of a denoising transition.  Closed form (DiffusionOPD,
arXiv:2605.15055): the gradient of mean (mu_S - mu_T)^2 / (2 S^2).  PPO's form: the negative log
ratio to the teacher as a reward, with fresh x' ~ p_S; as log-densities here are means over D
dimensions, its loss is D (logp_S - logp_T).detach() logp_S.  A third form subtracts the reward's
mean given the state, the best constant that PPO could know.  Student and teacher are two random
adapters of one network; states come from a rollout of the student.  Each seed draws another pair of
adapters, other states and other noise.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from diffusion.backend import DiffusionBackend, build
from diffusion.kernels import gaussian_logp, transition_mean
from diffusion.likelihoods import mean_square
from diffusion.transition import TransitionBatch
from mmrl import config as configuration
from mmrl.divergences import gaussian_kl
from mmrl.prompts.dataset import load_prompts
from mmrl.rollouts import make_requests
from mmrl.types import Prompt
from mmrl.weights import trainable

TASK = "all"
SETTINGS = ("backend.model.lora={rank: 4, alpha: 8}", "backend.model.dtype=fp32")


@dataclass(frozen=True, kw_only=True)
class Means:
    """Of R transitions: means of ``student`` (with its graph) and ``teacher`` [R, ...], S [R]."""

    student: Tensor
    teacher: Tensor
    std: Tensor

    @property
    def dimensions(self) -> int:
        """D."""
        return self.student[0].numel()


def closed_form(means: Means) -> Tensor:
    """KL(student || teacher) in nats per dimension [R], differentiable."""
    return gaussian_kl(mean_square(means.student, means.teacher), means.std)


def ppo_form(means: Means, noise: Tensor, *, baseline: bool) -> Tensor:
    """Score-function loss [R], a mean over M draws x' = mu_S + S z; z = ``noise`` [M, R, ...].

    ``baseline``: subtract the mean reward given the state, D times the closed form.
    """
    draws, size = noise.shape[0], means.dimensions
    std = means.std.repeat(draws)
    spread = std.view(-1, *[1] * (means.student.ndim - 1))

    def repeated(mean: Tensor) -> Tensor:
        return mean.double().repeat(draws, *[1] * (mean.ndim - 1))

    student = repeated(means.student)
    sample = student.detach() + spread * noise.flatten(0, 1)
    logp = gaussian_logp(sample, student, std)
    cost = size * (logp.detach() - gaussian_logp(sample, repeated(means.teacher), std))
    if baseline:
        cost = cost - size * closed_form(means).detach().repeat(draws)
    return (cost * logp).unflatten(0, (draws, -1)).mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """PPO's form averaged over ``draws`` at given states, against the closed form c.

    With g the average and s^2 = trace of cov(g), estimated from independent blocks:
    ``cosine`` of g and c; ``relative_norm``: g c / |c|^2, 1 in expectation, and its standard error
    ``norm_error``; ``distance`` |g - c| / |c|, expected to be ``expected_distance`` s / |c|;
    ``ratio``: trace of the covariance of one draw over |c|^2; the closed form's is 0.
    """

    draws: int
    cosine: float
    relative_norm: float
    norm_error: float
    distance: float
    expected_distance: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A step, or all: ``kl`` in nats (summed over D), agreement by form, and variances over states.

    ``over_states``: trace of the covariance over states and one draw each over that of the closed
    form, which varies with the state only, by form.  ``closed_spread``: the latter over the squared
    norm of the mean gradient.
    """

    step: str
    kl: float
    given_states: dict[str, Agreement]
    over_states: dict[str, float]
    closed_spread: float


FORMS = {"PPO": False, "PPO with baseline": True}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw, differentiate, compare, print, write."""
    options = _parser().parse_args(arguments)
    started = time.process_time()
    about = tables.machine()
    runs = {}
    for seed in options.seeds:
        print(f"seed {seed}", flush=True)
        backend, prompts = open_policies(options, seed)
        batches = roll_out(backend, prompts, max(options.states, options.given), seed)
        runs[seed] = measure(backend, batches, options, seed)
        about["parameters"] = sum(p.numel() for p in trainable(backend.model).values())
        about["dimensions"] = math.prod(backend._shape)
    about["cpu_seconds"] = time.process_time() - started
    markdown = report(list(runs.values()), options, about)
    lines = {str(seed): [asdict(line) for line in found] for seed, found in runs.items()}
    data = {"machine": about, "options": _plain(options), "seeds": lines}
    path = tables.write_results(options.out, "opd-variance", markdown, data)
    print(f"{markdown}\n\nwritten to {path}")
    return 0


# Policies and states


def open_policies(options: argparse.Namespace, seed: int) -> tuple[DiffusionBackend, list[Prompt]]:
    """A student with a random adapter, and another random adapter as its teacher."""
    run = configuration.load(options.config, [*SETTINGS, *options.overrides])
    prompts = load_prompts(run.prompts.source, "prompts.source")
    prompts = [replace(p, columns={**p.columns, "task": TASK}) for p in prompts]
    with tempfile.TemporaryDirectory() as folder:
        teacher = _build(run.backend.config, prompts, 2 * seed + 1, options.scale, frozenset())
        teacher.export(Path(folder), "")
        taught = {"teachers": [{"task": TASK, "path": folder}]}
        config: Any = run.backend.config
        config = type(config).model_validate(config.model_dump() | taught)
        needs = frozenset({"mean_gap_teacher"})
        student = _build(config, prompts, 2 * seed + 2, options.scale, needs)
    return student, prompts


def _build(
    config: Any, prompts: Sequence[Prompt], seed: int, scale: float, needs: frozenset[str]
) -> DiffusionBackend:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend = build(config, device=device, prompts=prompts, seed=seed, needs=needs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(device))
    return backend


def roll_out(
    backend: DiffusionBackend, prompts: Sequence[Prompt], samples: int, seed: int
) -> list[TransitionBatch]:
    """The transitions of one sample for each of the first prompts, one batch for each step."""
    if samples > len(prompts):
        raise SystemExit(f"{samples} states of each step, but only {len(prompts)} prompts")
    groups = backend.rollout(make_requests(prompts[:samples], 1, seed, 0))
    rows = [(group, 0) for group in groups]
    steps = range(backend.config.num_decisions)
    return [backend.collate(rows, slice(k, k + 1))[0] for k in steps]


def means_of(backend: DiffusionBackend, batch: TransitionBatch) -> Means:
    """Transition means of both policies at the states of ``batch``."""
    rows = backend._decisions.fold(batch, backend._device)
    velocity = backend._policy(rows)
    assert backend._teachers is not None, "the student has one"
    with torch.no_grad():
        taught = backend._teachers.velocities(rows, backend._velocity)
    coefficients = rows.detail.x, rows.detail.velocity
    return Means(
        student=transition_mean(rows.states, velocity, *coefficients),
        teacher=transition_mean(rows.states, taught, *coefficients),
        std=rows.detail.std,
    )


def part_of(batch: TransitionBatch, start: int, stop: int) -> TransitionBatch:
    """The samples ``start`` to ``stop``."""
    part = slice(start, stop)
    return TransitionBatch(
        before=batch.before[part],
        after=batch.after[part],
        steps=batch.steps[part],
        keys=batch.keys[part],
    )


# Gradients


def measure(
    backend: DiffusionBackend,
    batches: Sequence[TransitionBatch],
    options: argparse.Namespace,
    seed: int,
) -> list[Line]:
    """One line for each step, and the mean over steps, which is the gradient of a whole update."""
    generator = torch.Generator(backend._device).manual_seed(seed)
    closed, given, over, divergences = [], [], [], []
    for batch in batches:
        fixed = means_of(backend, part_of(batch, 0, options.given))
        divergence = closed_form(fixed).mean()
        closed.append(gradient(backend, divergence))
        divergences.append(float(divergence.detach()) * fixed.dimensions)
        given.append(blocks(backend, fixed, options, generator))
        over.append(over_states(backend, part_of(batch, 0, options.states), generator))
    lines = [
        line(str(int(batch.steps[0, 0])), divergences[k], closed[k], given[k], over[k], options)
        for k, batch in enumerate(batches)
    ]
    mean_kl = sum(divergences) / len(divergences)
    lines.append(line("all", mean_kl, _mean_of(closed), _mean_of(given), _mean_of(over), options))
    return lines


def gradient(backend: DiffusionBackend, loss: Tensor) -> Tensor:
    """Of a scalar with respect to all trained parameters [P], float32; the graph is kept."""
    parameters = list(trainable(backend.model).values())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in found])


def blocks(
    backend: DiffusionBackend, means: Means, options: argparse.Namespace, generator: torch.Generator
) -> dict[str, Tensor]:
    """By form, [blocks, P]: gradients of means over all states and ``options.draws`` draws each.

    The backward is linear in a draw's loss, so one for a block equals the mean of one for each.
    """
    found: dict[str, list[Tensor]] = {form: [] for form in FORMS}
    for _ in range(options.blocks):
        noise = _normal(means, options.draws, generator)
        for form, baseline in FORMS.items():
            loss = ppo_form(means, noise, baseline=baseline).mean()
            found[form].append(gradient(backend, loss))
    return {form: torch.stack(parts) for form, parts in found.items()}


def over_states(
    backend: DiffusionBackend, batch: TransitionBatch, generator: torch.Generator
) -> dict[str, Tensor]:
    """By form, and "closed": [states, P], each state's own gradient, from one draw."""
    found: dict[str, list[Tensor]] = {form: [] for form in ("closed", *FORMS)}
    for index in range(len(batch.keys)):
        means = means_of(backend, part_of(batch, index, index + 1))
        noise = _normal(means, 1, generator)
        losses = {"closed": closed_form(means)}
        losses |= {form: ppo_form(means, noise, baseline=b) for form, b in FORMS.items()}
        for form, loss in losses.items():
            found[form].append(gradient(backend, loss.sum()))
    return {form: torch.stack(parts) for form, parts in found.items()}


def line(
    step: str,
    kl: float,
    closed: Tensor,
    given: dict[str, Tensor],
    over: dict[str, Tensor],
    options: argparse.Namespace,
) -> Line:
    """Statistics of the gradients of one step."""
    reference = trace_of_covariance(over["closed"])
    return Line(
        step=step,
        kl=kl,
        given_states={form: agreement(closed, given[form], options.draws) for form in FORMS},
        over_states={form: trace_of_covariance(over[form]) / reference for form in FORMS},
        closed_spread=reference / squared_mean(over["closed"]),
    )


def agreement(closed: Tensor, found: Tensor, draws: int) -> Agreement:
    """``closed`` [P] against block means ``found`` [blocks, P] of ``draws`` each."""
    closed, found = closed.double(), found.double()
    mean, norm = found.mean(dim=0), float(closed.norm())
    one_block = trace_of_covariance(found)
    projections = found @ closed / norm**2
    return Agreement(
        draws=draws * len(found),
        cosine=float(mean @ closed / (mean.norm() * norm)),
        relative_norm=float(projections.mean()),
        norm_error=float(projections.std()) / math.sqrt(len(found)),
        distance=float((mean - closed).norm()) / norm,
        expected_distance=math.sqrt(one_block / len(found)) / norm,
        ratio=one_block * draws / norm**2,
    )


def trace_of_covariance(samples: Tensor) -> float:
    """Sum of the unbiased variances of the columns of [n, P], float64."""
    return float(samples.double().var(dim=0).sum())


def squared_mean(samples: Tensor) -> float:
    """Unbiased estimate of the squared norm of the expectation of the rows of [n, P]."""
    mean = samples.double().mean(dim=0)
    return float(mean @ mean) - trace_of_covariance(samples) / len(samples)


def _normal(means: Means, draws: int, generator: torch.Generator) -> Tensor:
    shape = (draws, *means.student.shape)
    device = means.student.device
    return torch.randn(shape, generator=generator, device=device).double()


def _mean_of(parts: Sequence[Any]) -> Any:
    """Mean over steps of tensors, or of dictionaries of them."""
    if isinstance(parts[0], Tensor):
        return torch.stack(list(parts)).mean(dim=0)
    return {form: _mean_of([part[form] for part in parts]) for form in parts[0]}


# Report


def report(
    runs: Sequence[Sequence[Line]], options: argparse.Namespace, about: dict[str, Any]
) -> str:
    """The whole result in markdown; ``runs``: the lines of each seed."""
    changes = f" with {' '.join(options.overrides)}" if options.overrides else ""
    draws = runs[0][0].given_states["PPO"].draws
    return "\n\n".join(
        [
            f"# Gradient of on-policy distillation on {options.config}{changes}",
            f"Student and teacher: random adapters of {about['parameters']} parameters (every "
            f"parameter moved by {options.scale:g} z); D = {about['dimensions']}. "
            f"{about['cpu_seconds']:.0f} CPU-seconds. Mean +- standard deviation over "
            f"{len(runs)} seeds, each with its own two adapters, states and draws.",
            f"## Given {options.given} states: do the two agree?",
            agreement_table(runs),
            f"{draws} draws for each state and seed, in {options.blocks} "
            "blocks. c: gradient of the closed form, which has variance 0 here; g: mean of PPO's "
            "form. cos: cosine of g and c. g c / |c|^2 is 1 in expectation; in brackets the "
            "standard error that the blocks of one seed predict (root mean square over seeds). "
            "|g - c| / |c| should be near the value in brackets, which is what the variance of the "
            "blocks predicts. variance: trace of the covariance of one draw for each of the "
            f"{options.given} states over |c|^2, without and with a baseline.",
            f"## Over {options.states} states, one draw each",
            states_table(runs),
            "Trace of the covariance over that of the closed form, which comes from the states "
            "alone and is itself the last column times the squared norm of the mean gradient. "
            "Step `all`: the mean over the steps, as in an update.",
            f"Machine: {tables.machine_line(about)}",
        ]
    )


def agreement_table(runs: Sequence[Sequence[Line]]) -> str:
    """One row for each step, of what holds at given states."""
    plain, baseline = FORMS
    header = ["step", "KL, nats", "cos", "g c / \\|c\\|^2", "\\|g - c\\| / \\|c\\|", "variance",
              "variance, baseline", "variance, closed"]  # fmt: skip
    rows = []
    for seeds in zip(*runs, strict=True):
        a = [x.given_states[plain] for x in seeds]
        error = math.sqrt(statistics.fmean(x.norm_error**2 for x in a))
        rows.append(
            [
                seeds[0].step,
                over_seeds((x.kl for x in seeds), ".3f"),
                over_seeds((x.cosine for x in a), ".4f"),
                f"{over_seeds((x.relative_norm for x in a), '.3f')} ({error:.3f})",
                f"{over_seeds((x.distance for x in a), '.3f')} "
                f"({statistics.fmean(x.expected_distance for x in a):.3f})",
                over_seeds((x.ratio for x in a), ".0f"),
                over_seeds((x.given_states[baseline].ratio for x in seeds), ".0f"),
                "0",
            ]
        )
    return tables.markdown_table(header, rows)


def states_table(runs: Sequence[Sequence[Line]]) -> str:
    """One row for each step, of variances over states."""
    header = ["step", *(f"{form} / closed" for form in FORMS), "closed / \\|mean\\|^2"]
    rows = [
        [
            seeds[0].step,
            *(over_seeds((x.over_states[form] for x in seeds), ".0f") for form in FORMS),
            over_seeds((x.closed_spread for x in seeds), ".2f"),
        ]
        for seeds in zip(*runs, strict=True)
    ]
    return tables.markdown_table(header, rows)


def over_seeds(values: Iterable[float], form: str) -> str:
    """Mean and sample standard deviation; the mean alone where there is one value."""
    found = tables.spread([*values])
    assert found is not None, "there is a seed"
    mean = f"{found.mean:{form}}"
    return mean if math.isnan(found.std) else f"{mean} +- {found.std:{form}}"


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "out"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.opd_variance")
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/diffusion/tiny-sd3/flow-grpo.yaml"))
    add("--scale", type=float, default=0.02, help="size of the random adapters")
    add("--given", type=int, default=8, help="states that are held fixed, of each step")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="pairs of random adapters")
    add("--blocks", type=int, default=12, help="independent means of draws, for standard errors")
    add("--draws", type=int, default=128, help="draws for each state in a block")
    add("--states", type=int, default=32, help="states of each step for the variance over states")
    add("--out", type=Path, default=tables.RESULTS, help="where the results go")
    add("overrides", nargs="*", help="a.b=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
