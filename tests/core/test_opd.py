"""Distillation of denoising steps: closed forms against velocities, divergences and sampling."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, float64, random_case
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from mmrl.errors import UserError
from mmrl.objectives import opd
from mmrl.schema import validate
from mmrl.types import PolicyTerms

SHAPE = (4, 3, 6)
STEP = float64([0.2, 0.1, 0.3])
SIGMA = float64([0.8, 0.5, 0.3])
A = 0.7


def velocities(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, dtype=torch.float64, generator=generator)


def distilled(student: Tensor, teacher: Tensor, factor: Tensor, **spreads: Tensor) -> PolicyTerms:
    """Means differ by ``factor`` [K] times the gap of velocities."""
    gap = (factor[:, None] * (student - teacher)).square().mean(-1)
    spread = {name: value.expand(SHAPE[:2]) for name, value in spreads.items()}
    return PolicyTerms(logp=torch.zeros(SHAPE[:2]).double(), mean_gap_teacher=gap, **spread)


def batch():
    return batch_of(torch.ones(SHAPE[:2], dtype=torch.bool), torch.zeros(4).double())


def loss(terms: PolicyTerms, **config) -> Tensor:
    return opd.loss(terms, batch(), opd.Config(**config)).loss


ODE = {"step_std": torch.zeros(3).double(), "diffusion": torch.zeros(3).double()}
G = A * (SIGMA / (1 - SIGMA)).sqrt()
SDE = {"step_std": G * STEP.sqrt(), "diffusion": G}
SDE_FACTOR = (1 + A**2 / 2) * STEP
"""Gap of flow_sde means over that of velocities."""


@pytest.mark.parametrize("spreads", [ODE, SDE], ids=["ode", "sde"])
def test_the_teacher_itself_has_nothing_to_learn(spreads):
    student = velocities(0).requires_grad_()
    value = loss(distilled(student, velocities(0), STEP, **spreads))
    assert not value.any()
    assert not torch.autograd.grad(value.sum(), student)[0].any()


@pytest.mark.parametrize("denominator", ["true", "drop_dt"])
def test_ode_loss_and_gradient(denominator):
    """1/2 dt^2 mean (v_S - v_T)^2, gradient dt^2 (v_S - v_T) / D, by either denominator."""
    student, teacher = velocities(0).requires_grad_(), velocities(1)
    value = loss(distilled(student, teacher, STEP, **ODE), denominator=denominator)
    gap = student.detach() - teacher
    close(value, (0.5 * STEP**2 * gap.square().mean(-1)).tolist())
    gradient = torch.autograd.grad(value.sum(), student)[0]
    close(gradient, (STEP[:, None] ** 2 * gap / SHAPE[-1]).tolist())


def test_sde_loss_is_the_divergence_of_the_steps():
    """kappa mean (v_S - v_T)^2, kappa = (1 + a^2/2)^2 (-dt) (1 - sigma) / (2 a^2 sigma)."""
    student, teacher = velocities(0), velocities(1)
    value = loss(distilled(student, teacher, SDE_FACTOR, **SDE))
    kappa = (1 + A**2 / 2) ** 2 * STEP * (1 - SIGMA) / (2 * A**2 * SIGMA)
    close(value, (kappa * (student - teacher).square().mean(-1)).tolist())
    std = SDE["step_std"][:, None].expand(SHAPE)
    steps = [Normal(SDE_FACTOR[:, None] * v, std) for v in (student, teacher)]
    close(value, kl_divergence(*steps).mean(-1).tolist())


def test_drop_dt_is_the_divergence_times_the_step():
    terms = distilled(velocities(0), velocities(1), SDE_FACTOR, **SDE)
    close(loss(terms, denominator="drop_dt"), (loss(terms) * STEP).tolist())


def test_closed_form_is_the_mean_of_the_sampled_form_without_its_variance():
    """w = 0.3, teacher at 0.1, S = 0.2: 5 exactly; sampled, mean 5 and variance 56.25 a draw."""
    w, teacher, std = float64([[0.3]]).requires_grad_(), 0.1, float64([[0.2]])
    one = torch.ones(1, 1, dtype=torch.bool)
    terms = PolicyTerms(
        logp=torch.zeros(1, 1).double(), mean_gap_teacher=(w - teacher) ** 2, step_std=std
    )
    value = opd.loss(terms, batch_of(one, torch.zeros(1).double()), opd.Config()).loss
    (closed,) = torch.autograd.grad(value.sum(), w)
    assert closed.item() == pytest.approx(5.0, abs=1e-12)
    z = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 0.3 + 0.2 * z
    log_ratio = Normal(0.3, 0.2).log_prob(x) - Normal(teacher, 0.2).log_prob(x)
    sampled = log_ratio * (x - 0.3) / 0.2**2
    # 5 standard errors: sqrt(56.25 / 2e5) = 0.017.
    assert sampled.mean().item() == pytest.approx(closed.item(), abs=0.085)
    assert sampled.var().item() == pytest.approx(56.25, rel=0.05)


def test_a_student_reaches_the_teacher_of_each_task():
    tasks, teachers = torch.tensor([0, 1, 1, 0]), velocities(2)[:2]
    student = torch.zeros_like(teachers).requires_grad_()
    # A quadratic with curvature 4 dt^2 / D at most, so this step size converges.
    optimizer = torch.optim.SGD([student], lr=SHAPE[-1] / (4 * 0.3**2))
    for _ in range(150):
        optimizer.zero_grad()
        loss(distilled(student[tasks], teachers[tasks], STEP, **ODE)).sum().backward()
        optimizer.step()
    close(student, teachers.tolist(), 1e-3)


def test_advantages_and_old_policies_play_no_part():
    terms, given = random_case()
    other = replace(given, advantages=-7 * given.advantages, logp_old=None)
    losses = [opd.loss(terms, b, opd.Config()).loss for b in (given, other)]
    assert torch.equal(*losses)


def test_a_spread_that_is_no_number_is_not_taken_for_an_ode():
    terms, given = random_case()
    for wrong in (float("nan"), -1.0):
        spread = torch.full_like(terms.step_std, wrong)
        with pytest.raises(ValueError, match="std must be positive"):
            opd.loss(replace(terms, step_std=spread), given, opd.Config())


@pytest.mark.parametrize(("written", "name"), [(True, "true"), ("true", "true"), ("drop_dt",) * 2])
def test_yaml_may_leave_out_the_quotes(written, name):
    assert validate(opd.Config, {"denominator": written}).denominator == name


@pytest.mark.parametrize("wrong", [False, "drop", 1])
def test_other_denominators_are_refused(wrong):
    with pytest.raises(UserError, match=r"objective\.denominator"):
        validate(opd.Config, {"denominator": wrong}, "objective")
