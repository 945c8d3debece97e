"""What each ratio-control method and adaptive penalty claims for itself, on toys that are exact."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from core_oracles import batch_of, close, float64, prepared
from ratio_oracles import GROUP, ready
from test_ratio_control import case, gradient

from mmrl.objectives import etr, gbpo, mdpo_mirror, mhpo, p3o_pairwise, r2vpo, real
from mmrl.regularisers import entropy_target, kl_target, orpo_occupancy
from mmrl.types import Advantages, PolicyTerms, Scores, Survey


def single(*advantages, logp_old=None):
    """A batch of samples with one decision each; the old log-probabilities are 0 if not given."""
    count = len(advantages)
    old = torch.zeros(count).double() if logp_old is None else logp_old
    return batch_of(torch.ones(count, 1).bool(), float64(advantages), logp_old=old[:, None])


# --- MHPO -----------------------------------------------------------------------------------------


def weight_at(ratio: float, **options) -> float:
    """M by autograd: minus the derivative in logp at advantage 1."""
    logp = float64([[math.log(ratio)]]).requires_grad_()
    batch = single(1.0)
    loss = mhpo.loss(PolicyTerms(logp=logp), batch, mhpo.Config(**options)).loss
    return -torch.autograd.grad(loss.sum(), logp)[0].item()


def test_mhpo_weight_has_its_published_values():
    at_one = math.exp(-(math.log(2) ** 1.5) - (math.log(2) / 0.8) ** 2)
    assert weight_at(1) == pytest.approx(at_one, rel=1e-12)
    for ratio, weight in ((1, 0.2651), (1.78, 0.396), (2, 0.391), (0.5, 0.054), (10, 0.082)):
        assert weight_at(ratio) == pytest.approx(weight, abs=5e-4)
    assert weight_at(0.1) == pytest.approx(7e-4, abs=5e-5)
    grid = [math.exp(x / 100) for x in range(-500, 500)]
    peak = max(grid, key=weight_at)
    assert peak == pytest.approx(1.78, abs=0.02)
    without = max(grid, key=lambda ratio: weight_at(ratio, hazard=False))
    assert without == pytest.approx(2.45, abs=0.03)
    assert weight_at(2.45, hazard=False) == pytest.approx(1.5925, abs=1e-4)
    for bound in (0.5, 1.5):
        weights = [weight_at(ratio, bound=bound) for ratio in grid]
        assert all(0 < weight <= math.exp(bound) for weight in weights)


@pytest.mark.parametrize(
    "options",
    [{}, {"bound": 0.7, "shape_up": 2.5, "onset_down": 0.5}, {"bound": None}, {"hazard": False}],
)
def test_mhpo_gradient_is_the_weight_times_the_advantage(options):
    """-A M everywhere, with M = exp(psi - zeta) sech^2(x / c) whatever the sign of A."""
    config, draw = mhpo.Config(**options), torch.Generator().manual_seed(0)
    logp, old, sizes = (torch.randn(n, 8, dtype=torch.float64, generator=draw) for n in (9, 9, 1))
    assert {*sizes[0].sign().tolist()} == {-1.0, 1.0}
    logp, old = logp.flatten()[:, None].requires_grad_(), old.flatten()
    batch = single(*sizes[0].repeat(9).tolist(), logp_old=old)
    loss = mhpo.loss(PolicyTerms(logp=logp), batch, config).loss
    (found,) = torch.autograd.grad(loss.sum(), logp)
    for slope, x, size in zip(
        found[:, 0].tolist(), (logp[:, 0] - old).tolist(), batch.advantages.tolist(), strict=True
    ):
        c = config.bound or math.inf
        psi = c * math.tanh(x / c) if config.bound else x
        zeta = (math.log1p(math.exp(psi)) / config.onset_up) ** config.shape_up
        zeta += (math.log1p(math.exp(-psi)) / config.onset_down) ** config.shape_down
        weight = math.exp(psi - (zeta if config.hazard else 0.0)) / math.cosh(x / c) ** 2
        assert slope == pytest.approx(-size * weight, rel=1e-10, abs=0)


def test_mhpo_with_neither_bound_nor_hazard_weighs_by_the_ratio():
    for ratio in (0.1, 1.0, 7.0):
        assert weight_at(ratio, bound=None, hazard=False) == pytest.approx(ratio, rel=1e-12)
        assert weight_at(ratio, bound=1e6, hazard=False) == pytest.approx(ratio, rel=1e-9)


# --- GBPO -----------------------------------------------------------------------------------------


def scores_of(rewards):
    """One group whose rewards are its advantages."""
    values, keep = float64(rewards), torch.ones(len(rewards), dtype=torch.bool)
    group = torch.zeros(len(rewards), dtype=torch.int64)
    return Scores(combined=values, group=group, valid=keep), Advantages(values=values, keep=keep)


def gbpo_at(rewards, ratios, **options):
    """Loss and gradient in logp of one group, one decision each."""
    config = gbpo.Config(**options)
    logp = float64(ratios).log()[:, None].requires_grad_()
    given = scores_of(rewards)
    batch = replace(single(*rewards), signals=gbpo.signals(*given, config))
    loss = gbpo.loss(PolicyTerms(logp=logp), batch, config).loss
    return loss[:, 0], torch.autograd.grad(loss.sum(), logp)[0][:, 0]


def test_gbpo_draws_a_ratio_back_to_its_target():
    rewards = (-2.0, -1.0, 1.0, 2.0)
    bounds = {"clip_low": 0.2, "clip_high": 0.3}
    loss, _ = gbpo_at(rewards, (0.8, 0.8, 1.3, 1.3), **bounds)
    close(loss, [0.0] * 4)
    loss, slope = gbpo_at(rewards, (0.7, 0.7, 1.4, 1.4), **bounds)
    assert (loss > 0).all()
    # Beyond the bound PPO is flat; here the slope is r |A|, back towards it.
    close(slope, [-0.7 * 2, -0.7 * 1, 1.4 * 1, 1.4 * 2], 1e-9)


@pytest.mark.parametrize("temperature", [1e-4, 0.1, 1.0, 100.0])
@pytest.mark.parametrize("gap", ["normalised", "reward"])
def test_gbpo_targets_lie_within_the_bounds(temperature, gap):
    """A target is where the slope of the loss turns, found by halving (A = 0 would have none)."""
    rewards = (-1e6, -1.0, 0.1, 0.5, 1e6)
    options = {"temperature": temperature, "gap": gap, "clip_low": 0.1, "clip_high": 0.4}
    low, high = torch.full((5,), 1e-3).double(), torch.full((5,), 10.0).double()
    assert (gbpo_at(rewards, low.tolist(), **options)[1] < 0).all()
    assert (gbpo_at(rewards, high.tolist(), **options)[1] > 0).all()
    for _ in range(40):
        target = (low + high) / 2
        above = gbpo_at(rewards, target.tolist(), **options)[1] > 0
        low, high = torch.where(above, low, target), torch.where(above, target, high)
    assert (target >= 0.9 - 2 * gbpo.TOLERANCE).all()
    assert (target <= 1.4 + 2 * gbpo.TOLERANCE).all()
    assert target.tolist() == sorted(target.tolist())


def test_gbpo_anchors_the_median_at_one():
    """Binary rewards with a correct majority: only the wrong samples move."""
    rewards = (0.25, 0.25, 0.25, -0.75)
    _, slope = gbpo_at(rewards, (1.0,) * 4)
    close(slope, [0, 0, 0, 0.75])
    close(gbpo_at(rewards, (1.1,) * 4)[1][:3], [1.1 * 0.25] * 3)


def test_gbpo_lets_no_rounding_choose_a_side():
    """A median sample starts at its target, a kink: the last bits of a ratio are chance."""
    rewards = (1.0, 0.0, -1.0)
    for noise in (1e-7, -1e-7):
        close(gbpo_at(rewards, (1.0, 1.0 + noise, 1.0))[1], [-1.0, 0.0, 1.0], 1e-6)
    rewards = (0.75, 0.25, -1.0)
    for noise, slope in ((1e-6, 0.0), (1e-4, 0.25), (-1e-4, -0.25)):
        found = gbpo_at(rewards, (1.0, 1.0 + noise, 1.0))[1][1].item()
        assert found == pytest.approx(slope, abs=1e-4)


def test_the_bounded_optimum_is_a_policy_and_gains_what_it_should():
    """pi* = pi_old (1 + e sign(Q - median)) sums to 1 and gains e E|Q - median|."""
    old, q, e = float64([0.2, 0.3, 0.3, 0.2]), float64([-3.0, 0.5, 1.5, 4.0]), 0.3
    median = 1.0
    loss, _ = gbpo_at(
        (q - median).tolist(), (1 + e * (q - median).sign()).tolist(), clip_low=e, clip_high=e
    )
    close(loss, [0.0] * 4)
    best = old * (1 + e * (q - median).sign())
    close(best.sum(), 1.0)
    close((best * q).sum() - (old * q).sum(), e * (old * (q - median).abs()).sum().item())


# --- ETR ------------------------------------------------------------------------------------------


def etr_scale(share: float, size: float, config: etr.Config) -> float:
    """Upper bound less 1, read off the loss of a very large ratio."""
    rewards = [1.0] * round(share * 10) + [0.0] * (10 - round(share * 10))
    spread = etr.signals(*scores_of(rewards), config)["spread"]
    terms = PolicyTerms(logp=float64([[9.0]]))
    batch = single(size)
    batch = replace(batch, signals={"spread": spread[:1]})
    return -etr.loss(terms, batch, config).loss.item() / size - 1


def test_etr_is_widest_in_the_middle_and_for_large_advantages():
    config = etr.Config(micro=0.5, macro=1.0, clip_max=1.0)
    sizes = (0.1, 0.5, 1.0, 5.0)
    for share in (0.1, 0.5, 0.7):
        scales = [etr_scale(share, size, config) for size in sizes]
        assert scales == sorted(scales)
        assert scales[0] < scales[-1]
    by_share = [etr_scale(share / 10, 1.0, config) for share in range(11)]
    close(float64(by_share), by_share[::-1])
    assert max(by_share) == by_share[5]
    narrow = etr.Config(micro=9, macro=9, clip_max=0.35)
    assert etr_scale(0.5, 5.0, narrow) == pytest.approx(0.35)
    for share in range(11):
        assert 0.1 <= etr_scale(share / 10, 0.01, narrow) <= 0.35 + 1e-12


def test_etr_clips_less_with_wider_bounds():
    terms, batch = case()
    shares = []
    for clip in (0.1, 0.2, 0.3, 0.4, 0.9):
        config = etr.Config(clip_low=clip, clip_high=clip, clip_max=1.0)
        metrics = etr.loss(terms, ready(etr, config, terms, batch), config).metrics
        shares.append(metrics["clip_ratio/region"][0])
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]


# --- R2VPO ----------------------------------------------------------------------------------------


def test_r2vpo_rests_where_the_variance_balances_the_advantage():
    for size, multiplier in ((1.0, 2.0), (-0.5, 1.0), (3.0, 0.7)):
        logp = float64([[math.log(1 + size / (2 * multiplier))]]).requires_grad_()
        batch = batch_of(
            torch.ones(1, 1).bool(), float64([size]), logp_old=torch.zeros(1, 1).double()
        )
        batch = replace(batch, state={"multiplier": multiplier})
        loss = r2vpo.loss(PolicyTerms(logp=logp), batch, r2vpo.Config()).loss
        close(torch.autograd.grad(loss.sum(), logp)[0], [[0.0]])


def expectation(old, new):
    """Mean of (r - 1)^2 under ``old``, over all actions; each from the metric of a batch of it."""
    total = 0.0
    for before, after in zip(old, new, strict=True):
        terms = PolicyTerms(logp=after.log()[None, None])
        batch = single(0.0, logp_old=before.log()[None])
        found = r2vpo.loss(terms, batch, r2vpo.Config()).metrics["ratio/variance"]
        total += before.item() * found[0]
    return total


def test_r2vpo_variance_is_chi_square():
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64, generator=draw)
    old = logits.softmax(0)
    new = (logits + torch.randn(5, dtype=torch.float64, generator=draw)).softmax(0)
    assert expectation(old, new) == pytest.approx(((new - old) ** 2 / old).sum().item(), rel=1e-12)
    near = (logits + 1e-3 * torch.randn(5, dtype=torch.float64, generator=draw)).softmax(0)
    kl = (near * (near / old).log()).sum().item()
    assert expectation(old, near) == pytest.approx(2 * kl, rel=1e-2)


def test_r2vpo_multiplier_grows_just_above_the_target():
    config = r2vpo.Config(target=0.1, rate=0.5)
    for variance in (0.0, 0.05, 0.0999, 0.1001, 5.0):
        after = r2vpo.update_state({"multiplier": 1.0}, {"ratio/variance": variance}, config)
        assert (after["multiplier"] > 1.0) == (variance > 0.1)
        assert after["multiplier"] > 0
    doubled = {"multiplier": 1.0}
    for _ in range(20):
        config = r2vpo.Config()
        doubled = r2vpo.update_state(doubled, {"ratio/variance": 2 * config.target}, config)
    assert doubled["multiplier"] == pytest.approx(2.0)


# --- MDPO -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_mdpo_converges_to_the_mirror_step(t):
    """Many steps on exact expectations end at old exp(t A) / Z, of value log E exp(t A) / t."""
    old = float64([0.4, 0.3, 0.2, 0.1])
    size = float64([1.0, -0.5, 0.3, 2.0])
    logits = old.log().requires_grad_()
    batch = single(*size.tolist(), logp_old=old.log())
    config = mdpo_mirror.Config(step_size=t)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def value():
        logp = logits.log_softmax(0)[:, None]
        loss = mdpo_mirror.loss(PolicyTerms(logp=logp), batch, config).loss
        return (old[:, None] * loss).sum()

    def closure():
        optimizer.zero_grad()
        loss = value()
        loss.backward()
        return loss

    optimizer.step(closure)
    target = old * (t * size).exp()
    close(logits.softmax(0), (target / target.sum()).tolist(), 1e-6)
    close(-value(), (target.sum().log() / t).item(), 1e-9)


def test_mdpo_divergence_is_positive_and_rests_at_t_times_a():
    for gap in (-2.0, -0.1, 0.0, 0.1, 2.0):
        logp = float64([[gap]]).requires_grad_()
        batch = batch_of(
            torch.ones(1, 1).bool(), float64([gap / 0.5]), logp_old=torch.zeros(1, 1).double()
        )
        for form in ("sample_kl", "squared"):
            config = mdpo_mirror.Config(form=form, step_size=0.5)
            out = mdpo_mirror.loss(PolicyTerms(logp=logp), batch, config)
            close(torch.autograd.grad(out.loss.sum(), logp)[0], [[0.0]])
            if form == "sample_kl":
                divergence = out.metrics["mdpo/divergence"][0]
                assert divergence > 0 if gap else divergence == 0


def test_mdpo_divergence_estimates_kl():
    old, new = float64([0.5, 0.3, 0.2]), float64([0.2, 0.5, 0.3])
    batch = single(0, 0, 0, logp_old=old.log())
    loss = mdpo_mirror.loss(PolicyTerms(logp=new.log()[:, None]), batch, mdpo_mirror.Config()).loss
    close((old[:, None] * loss).sum(), (new * (new / old).log()).sum().item())


def test_mdpo_with_tiny_steps_stays():
    """t -> 0: any move costs more than it gains."""
    for gap in (-0.1, 0.1):
        logp = float64([[gap]]).requires_grad_()
        batch = batch_of(
            torch.ones(1, 1).bool(), float64([1.0]), logp_old=torch.zeros(1, 1).double()
        )
        loss = mdpo_mirror.loss(
            PolicyTerms(logp=logp), batch, mdpo_mirror.Config(step_size=1e-3)
        ).loss
        assert math.copysign(1, torch.autograd.grad(loss.sum(), logp)[0].item()) == math.copysign(
            1, gap
        )


def test_mdpo_schedule_falls_to_its_floor():
    config = mdpo_mirror.Config(schedule="linear")
    steps = [mdpo_mirror.step_size(k / 10, config) for k in range(10)]
    assert steps == pytest.approx([1 - k / 10 for k in range(10)])
    assert mdpo_mirror.step_size(0.99, config) == 0.05
    assert mdpo_mirror.step_size(0.5, mdpo_mirror.Config(step_size=3)) == 3


# --- P3O ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["separate", "joint"])
def test_p3o_ignores_a_constant_of_the_prompt(form):
    config = p3o_pairwise.Config(form=form)
    terms, batch = case()
    shift = float64([{3: 5.0, 1: -2.0, 8: 1.0}[g] for g in GROUP.tolist()])
    moved = replace(batch, advantages=batch.advantages + shift)
    first, second = (
        gradient(p3o_pairwise, config, terms, ready(p3o_pairwise, config, terms, each))
        for each in (batch, moved)
    )
    close(first[0], second[0], 1e-9)
    close(first[1], second[1].tolist(), 1e-9)
    flat = replace(batch, advantages=torch.ones(9).double())
    value, slopes = gradient(p3o_pairwise, config, terms, ready(p3o_pairwise, config, terms, flat))
    assert value == 0
    assert not slopes.any()


def test_p3o_expectation_is_the_policy_gradient():
    """Over all pairs of a categorical policy, unclipped, on samples of another one too."""
    draw = torch.Generator().manual_seed(3)
    old = torch.randn(5, dtype=torch.float64, generator=draw).softmax(0)
    rewards = torch.randn(5, dtype=torch.float64, generator=draw)
    for logits in (old.log(), torch.randn(5, dtype=torch.float64, generator=draw)):
        logits = logits.clone().requires_grad_()
        config, total = p3o_pairwise.Config(clip=1e9), torch.zeros(()).double()
        for i in range(5):
            for j in range(5):
                rows = [i, j]
                batch = batch_of(
                    torch.ones(2, 1).bool(), rewards[rows], logp_old=old.log()[rows][:, None]
                )
                given = prepared(p3o_pairwise, config, batch, torch.zeros(2).long(), {})
                terms = PolicyTerms(logp=logits.log_softmax(0)[rows][:, None])
                loss = p3o_pairwise.loss(terms, given, config).loss.mean()
                total = total + old[i] * old[j] * loss
        (found,) = torch.autograd.grad(total, logits)
        policy = logits.softmax(0)
        (wanted,) = torch.autograd.grad(-(policy * rewards).sum(), logits)
        close(found, wanted.tolist())


def test_p3o_clips_the_sample_that_has_moved_enough():
    config = p3o_pairwise.Config(clip=0.2)
    logp = float64([[math.log(1.5)], [math.log(0.9)]]).requires_grad_()
    batch = batch_of(
        torch.ones(2, 1).bool(), float64([1.0, -1.0]), logp_old=torch.zeros(2, 1).double()
    )
    given = prepared(p3o_pairwise, config, batch, torch.zeros(2).long(), {})
    loss = p3o_pairwise.loss(PolicyTerms(logp=logp), given, config).loss
    close(loss, [[-2 * 1.2], [2 * 0.9]])
    close(torch.autograd.grad(loss.sum(), logp)[0], [[0.0], [2 * 0.9]])


# --- REAL -----------------------------------------------------------------------------------------


def real_at(logits, labels, **options):
    """Value of the group, and the derivative of it in each logit."""
    config = real.Config(**options)
    values = float64(labels)
    survey = Survey(
        group=torch.zeros(len(labels), dtype=torch.int64),
        length=torch.ones(len(labels)).double(),
        log_ratio={"old": float64(logits)},
        signals={"label": values},
    )
    found = real.couple(survey, config)
    return found["value"][0].item(), found["slope"] / len(labels)


def test_real_weights_are_monotone_and_bounded():
    others, tau = (0.3, -0.4), 0.5
    grid = [x / 4 for x in range(-20, 21)]
    right = [-real_at((x, *others), (1, 1, -1))[1][0].item() for x in grid]
    wrong = [real_at((x, *others), (-1, 1, -1))[1][0].item() for x in grid]
    assert right == sorted(right, reverse=True)
    assert wrong == sorted(wrong)
    assert all(0 < weight < 1 / tau for weight in right + wrong)
    logits = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = [1] * 60 + [-1] * 4
    slopes = real_at(logits.tolist(), labels)[1].abs()
    assert slopes[:60].sum() < 1 / tau
    assert slopes[60:].sum() < 1 / tau


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_real_weights_in_closed_form(tau):
    """exp(-y s / tau) / (1 + sum over the class) / tau; bce: of each alone, over the group."""
    draw = torch.Generator().manual_seed(1)
    for labels in ((1, -1), (1, 1, -1), (-1, 1, -1, -1, 1, 1, -1)):
        logits = (2 * torch.randn(len(labels), dtype=torch.float64, generator=draw)).tolist()
        e = [math.exp(-y * s / tau) for y, s in zip(labels, logits, strict=True)]
        total = {y: 1 + sum(x for x, z in zip(e, labels, strict=True) if z == y) for y in (1, -1)}
        wanted = [-y * x / total[y] / tau for x, y in zip(e, labels, strict=True)]
        close(real_at(logits, labels, temperature=tau)[1], wanted)
        alone = [-y * x / (1 + x) / tau / len(e) for x, y in zip(e, labels, strict=True)]
        close(real_at(logits, labels, temperature=tau, form="bce")[1], alone)


def test_real_of_one_pair_is_two_logistic_losses():
    value, _ = real_at((0.7, -0.2), (1, -1))
    assert value == pytest.approx(
        math.log1p(math.exp(-1.4)) + math.log1p(math.exp(-0.4)), rel=1e-12
    )


def test_real_at_a_high_temperature_is_reinforce_with_labels():
    slope = 1e9 * real_at((0.7, -0.2, 3.0, 1.0, -1.0), (1, 1, 1, -1, -1), temperature=1e9)[1]
    close(slope, [-1 / 4] * 3 + [1 / 3] * 2, 1e-6)


def test_real_single_class_groups():
    for labels in ((1, 1), (-1, -1)):
        value, slope = real_at((0.3, 0.1), labels)
        assert value == 0
        assert not slope.any()
        value, slope = real_at((0.3, 0.1), labels, threshold=0.5, single_class="keep")
        assert value > 0
        assert slope.all()


# --- occupancy ------------------------------------------------------------------------------------


def test_occupancy_penalty_is_chi_square_in_expectation():
    draw = torch.Generator().manual_seed(2)
    ref = torch.randn(5, dtype=torch.float64, generator=draw).softmax(0)
    new = torch.randn(5, dtype=torch.float64, generator=draw).softmax(0)
    ratio = new / ref
    chi2 = ((new - ref) ** 2 / ref).sum().item()
    close((new * (ratio - 1)).sum(), chi2)
    close((new * (1 / ratio - 1)).sum(), 0.0)
    kl = (new * ratio.log()).sum().item()
    assert kl <= math.log1p(chi2) <= chi2
    # The penalty itself, with each action as often as the policy draws it, in 1 / 10^4.
    counts = (new * 1e4).round().long()
    total = ratio.log().repeat_interleave(counts)
    survey = Survey(
        group=torch.zeros(len(total), dtype=torch.int64),
        length=torch.ones(len(total)).double(),
        log_ratio={"reference": total},
    )
    for form, wanted in (("chi2", chi2), ("sqrt_chi2", math.sqrt(chi2)), ("kl", kl)):
        found = orpo_occupancy.couple(survey, orpo_occupancy.Config(form=form))
        assert found["value"][0].item() == pytest.approx(wanted, rel=2e-3)


def test_occupancy_terms_are_never_negative():
    for total in (-30.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 30.0):
        survey = Survey(
            group=torch.zeros(1, dtype=torch.int64),
            length=torch.ones(1).double(),
            log_ratio={"reference": float64([total])},
        )
        for form in ("chi2", "kl"):
            value = orpo_occupancy.couple(survey, orpo_occupancy.Config(form=form))["value"].item()
            assert value >= 0


# --- weights that follow a target -----------------------------------------------------------------


def test_a_divergence_above_its_target_is_weighed_more():
    config = kl_target.Config(target=0.1)
    for divergence in (0.0, 0.05, 0.11, 3.0):
        after = kl_target.update_state({"multiplier": 1.0}, {"kl_reference": divergence}, config)
        assert (after["multiplier"] > 1) == (divergence > 0.1)
        assert 0.98 <= after["multiplier"] <= 1.02


def test_entropy_is_rewarded_only_below_its_target():
    config = entropy_target.Config(target=0.2)
    state = entropy_target.initial_state(config)
    for _ in range(3):
        state = entropy_target.update_state(state, {"entropy": 0.1}, config)
    assert state == {"multiplier": 3.0, "applied": True}
    state = entropy_target.update_state(state, {"entropy": 0.3}, config)
    assert state == {"multiplier": 2.0, "applied": False}
