"""The backend on a tiny random pipeline: contract, noise, gaps, weights, precision.

The numbers in names refer to the list of checks in the specification of AWM.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_sd3 import ALL_TERMS, PROMPTS, make_batch, make_requests

from diffusion.likelihoods import interpolate, surrogate_logp
from diffusion.models.base import Condition
from diffusion.noise import normal
from diffusion.schedule import sigma_grid
from mmrl.advantages import group as group_advantage
from mmrl.objectives import grpo
from mmrl.types import Prompt, RolloutRequest, Scores
from mmrl.weights import trainable

CPU = torch.device("cpu")
LOGP = frozenset({"logp"})


def latents(groups):
    return torch.cat([group.payload.x0 for group in groups])


def gradients(backend):
    return {name: p.grad.clone() for name, p in trainable(backend.model).items()}


def gradient_of(backend, loss):
    backend.model.zero_grad()
    loss.backward()
    return gradients(backend)


def move(backend, scale=0.05, seed=0):
    """Random step of every trained parameter; returns the old values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


# Rollout


def test_groups_arrive_in_order_with_images_and_latents(make):
    backend = make()
    requests = make_requests(group_size=3, count=3)
    groups = list(backend.rollout(requests))
    assert [group.request for group in groups] == requests
    for group in groups:
        assert group.payload.x0.shape == (3, 4, 8, 8)
        assert group.payload.x0.dtype == torch.float32
        assert not group.payload.x0.requires_grad
        assert [image.size for image in group.outputs] == [(16, 16)] * 3
        assert group.mask.all()
        assert group.mask.shape == (3, 2)
        assert group.logp_old is None


def test_a_group_is_yielded_before_the_next_is_drawn(make, monkeypatch):
    backend = make(rollout={"batch_size": 2})
    drawn = []
    draw = backend._draw
    monkeypatch.setattr(
        backend,
        "_draw",
        lambda keys, evaluation: drawn.append(len(keys)) or draw(keys, evaluation),
    )
    groups = backend.rollout(make_requests(group_size=2, count=2))
    next(groups)
    assert drawn == [2]
    next(groups)
    assert drawn == [2, 2]


@pytest.mark.parametrize(
    "rollout",
    [
        {"scheduler": "euler"},
        {"scheduler": "dpmpp_2m", "grid": "linspace_shifted"},
        {"scheduler": "sa_solver", "grid": "awm", "noise_level": 0.5},
        {"scheduler": "euler", "guidance": 3.0},
    ],
)
def test_samples_do_not_depend_on_the_batch_size(make, rollout):
    requests = make_requests(group_size=4, count=2)
    small, large = (
        latents(make(rollout=rollout | {"batch_size": size}).rollout(requests)) for size in (3, 8)
    )
    torch.testing.assert_close(small, large, rtol=0, atol=1e-5)
    assert (small[0] - small[1]).abs().max() > 0.1


def test_groups_of_unlike_sizes_hold_the_samples_of_equal_ones(make):
    backend = make(rollout={"batch_size": 3})
    requests = make_requests(group_size=4, count=2)
    equal = list(backend.rollout(requests))
    asked = [replace(r, group_size=n) for r, n in zip(requests, (4, 1), strict=True)]
    ragged = list(backend.rollout(asked))
    for request, group, whole in zip(asked, ragged, equal, strict=True):
        expected = whole.payload.x0[: request.group_size]
        torch.testing.assert_close(group.payload.x0, expected, rtol=0, atol=1e-5)
    rows = [(group, i) for group in ragged for i in range(group.request.group_size)]
    whole = [(group, i) for group, n in zip(equal, (4, 1), strict=True) for i in range(n)]
    found, expected = (
        backend.evaluate(make_batch(backend, None, rows=x), LOGP).logp for x in (rows, whole)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_samples_follow_the_seed_the_step_and_the_prompt_only(make):
    backend = make()
    base = make_requests()
    drawn = latents(backend.rollout(base))
    assert torch.equal(drawn, latents(backend.rollout(base)))
    alone = latents(backend.rollout([replace(base[1], index=9)]))
    torch.testing.assert_close(alone, drawn[2:], rtol=0, atol=1e-5)
    for change in ({"seed": 8}, {"stream": 1}):
        other = latents(backend.rollout([replace(request, **change) for request in base]))
        assert (other - drawn).abs().max() > 0.1


def test_guidance_extrapolates_from_the_empty_prompt(make):
    guided = make(rollout={"guidance": 3.0})
    with torch.no_grad():
        x = torch.randn(2, 4, 8, 8)
        ids = [PROMPTS[0].id, PROMPTS[1].id]
        times = torch.full((2,), 0.5)
        found = guided._velocity_for(ids, 3.0)(x, times)
        with_prompt = guided._velocity_for(ids, 1.0)(x, times)
        without = guided._velocity_for(["", ""], 1.0)(x, times)
    torch.testing.assert_close(found, 3 * with_prompt - 2 * without, rtol=0, atol=1e-5)
    assert (found - with_prompt).abs().max() > 0.1


def test_evaluation_uses_its_own_settings(make):
    settings = {"num_steps": 9, "guidance": 2.0, "scheduler": "dpmpp_2m"}
    different, plain = make(evaluation=settings), make(rollout=settings)
    requests = make_requests(stream=-1)
    found = latents(different.rollout(requests, evaluation=True))
    assert torch.equal(found, latents(plain.rollout(requests)))
    assert not torch.allclose(found, latents(different.rollout(requests)))


def test_unknown_prompts_are_named(make):
    request = RolloutRequest(
        prompt=Prompt(id="new", text="x"), group_size=1, seed=0, stream=0, index=0
    )
    with pytest.raises(ValueError, match=r"\['new'\] were not among those given to build"):
        next(make().rollout([request]))


def test_each_text_is_encoded_once_and_encoders_are_freed(make, monkeypatch):
    from diffusion.models.sd3 import SD3

    calls = []
    encode = SD3.encode
    monkeypatch.setattr(SD3, "encode", lambda s, p, n: calls.append(list(p)) or encode(s, p, n))
    backend = make()
    assert calls == [[prompt.text for prompt in PROMPTS]]
    pipeline = backend._family._pipeline
    assert pipeline.text_encoder is None
    assert pipeline.text_encoder_2 is None


# Likelihood


def test_logp_equals_a_loop_over_the_formula(make):
    backend = make()
    groups = list(backend.rollout(make_requests(group_size=2, count=2)))
    with torch.no_grad():
        terms = backend.evaluate(make_batch(backend, groups), ALL_TERMS)
    payload, _ = backend.collate([(group, i) for group in groups for i in range(2)])
    for b, key in enumerate(payload.keys):
        condition = backend._conditions[key.prompt_id]
        noise = normal([key], "likelihood", (2, 4, 8, 8))[0]
        for k, t in enumerate(payload.times[b].tolist()):
            x_t = (1 - t) * payload.x0[b] + t * noise[k]
            with torch.no_grad():
                v = backend.model(
                    hidden_states=x_t[None],
                    timestep=torch.tensor([1000 * t]),
                    encoder_hidden_states=condition.text,
                    pooled_projections=condition.pooled,
                ).sample[0]
            l2 = float(((v.double() - (noise[k] - payload.x0[b]).double()) ** 2).mean())
            expected = -t / 0.25 * ((l2 + 1e-10) ** 0.25 - 1e-10**0.25)
            assert terms.logp[b, k].item() == pytest.approx(expected, rel=1e-5)
            assert terms.sigma[b, k].item() == pytest.approx(t)


def test_scores_do_not_depend_on_the_neighbours(make):
    backend = make()
    groups = list(backend.rollout(make_requests()))
    whole = backend.evaluate(make_batch(backend, groups), ALL_TERMS)
    for row, (group, index) in enumerate([(g, i) for g in groups for i in range(2)]):
        alone = make_batch(backend, groups, rows=[(group, index)])
        alone = backend.evaluate(alone, ALL_TERMS)
        torch.testing.assert_close(alone.logp[0], whole.logp[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
def test_the_configured_weighting_is_used(make, weighting):
    backend = make(likelihood={"weighting": weighting, "ghuber_power": 0.5})
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    rows = backend._decisions.fold(batch.payload, CPU)
    with torch.no_grad():
        velocity = backend._policy(rows)
        target = (rows.detail.noise - rows.detail.x0).double()
        error = (velocity.double() - target).square().mean((1, 2, 3))
        expected = surrogate_logp(error, rows.sigma, weighting, 0.5).view(2, 4).T
        found = backend.evaluate(batch, LOGP).logp
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "sampler", ["discrete", "discrete_wo_init", "discrete_with_init", "logit_normal", "uniform"]
)
def test_the_configured_time_sampler_is_used(make, sampler):
    backend = make(rollout={"num_steps": 9}, likelihood={"time_sampler": sampler, "num_times": 3})
    group = next(backend.rollout(make_requests()))
    levels = set(sigma_grid("diffusers_default", 9, 3.0).tolist())
    drawn = []
    for stream in range(12):
        moved = replace(group, request=replace(group.request, stream=stream))
        drawn.append(backend.collate([(moved, 0)])[0].times[0])
    times = torch.stack(drawn)
    assert ((times > 0) & (times <= 1)).all()
    assert (set(times.flatten().tolist()) <= levels) == sampler.startswith("discrete")
    share_of_pure_noise = (times[:, 0] == 1).double().mean().item()
    low, high = {"discrete": (0.01, 0.9), "discrete_with_init": (1, 1)}.get(sampler, (0, 0))
    assert low <= share_of_pure_noise <= high


def test_6_times_are_shared_and_noise_is_not(make):
    backend = make(rollout={"num_steps": 14}, likelihood={"num_times": 6})
    groups = list(backend.rollout(make_requests(group_size=3, count=3)))
    payload, mask = backend.collate([(group, i) for group in groups for i in range(3)])
    assert (payload.times == payload.times[:1]).all()
    assert mask.all()
    rows = backend._decisions.fold(payload, CPU)
    # T-major: row k B + b.
    assert (rows.sigma.view(6, 9) == payload.times.T).all()
    flat = rows.detail.noise.flatten(1)
    similarity = flat @ flat.T / flat.shape[1]
    assert (similarity - torch.eye(54)).abs().max() < 0.5
    expected = interpolate(rows.detail.x0, rows.detail.noise, rows.sigma)
    torch.testing.assert_close(rows.states, expected)


def test_times_of_a_group_may_be_its_own(make):
    backend = make(rollout={"num_steps": 14}, likelihood={"times_shared_by": "group"})
    groups = list(backend.rollout(make_requests(group_size=2, count=3)))
    times = make_batch(backend, groups).payload.times.view(3, 2, 2)
    assert (times == times[:, :1]).all()
    assert len({tuple(row) for row in times[:, 0].tolist()}) > 1


def test_times_of_a_sample_may_be_its_own(make):
    backend = make(rollout={"num_steps": 14}, likelihood={"times_shared_by": "sample"})
    groups = list(backend.rollout(make_requests(group_size=3, count=2)))
    times = make_batch(backend, groups).payload.times
    assert len({tuple(row) for row in times.tolist()}) > 3


def test_another_step_has_other_times_and_noise(make):
    backend = make(rollout={"num_steps": 14})
    group = next(backend.rollout(make_requests()))
    later = replace(group, request=replace(group.request, stream=5))
    first, second = (backend.collate([(g, 0)])[0] for g in (group, later))
    assert not torch.equal(first.times, second.times)
    noise = [payload.noise for payload in (first, second)]
    assert (noise[0] - noise[1]).abs().max() > 0.5


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_replays_are_bit_equal_with_and_without_gradient(make, lora):
    backend = make(lora=lora)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    with torch.no_grad():
        known = backend.evaluate(batch, LOGP).logp
    for needs in (LOGP, ALL_TERMS):
        assert torch.equal(backend.evaluate(batch, needs).logp.detach(), known)


# AWM with the clipped objective


def policy_loss(backend, batch, importance="decision", clip=1.0):
    terms = backend.evaluate(batch, LOGP)
    config = grpo.Config(clip_low=clip, clip_high=clip, importance=importance)
    return terms, grpo.loss(terms, batch, config).loss


@pytest.mark.parametrize("importance", ["decision", "sample"])
def test_1_on_policy_ratio_is_exactly_one(make, importance):
    backend = make()
    groups = list(backend.rollout(make_requests()))
    advantages = [0.5, -1.0, 0.25, 0.75]
    batch = make_batch(backend, groups, advantages)
    with torch.no_grad():
        anchored = replace(batch, logp_old=backend.evaluate(batch, LOGP).logp)
    for same in (batch, anchored):
        _, loss = policy_loss(backend, same, importance)
        assert torch.equal(loss, -batch.advantages[:, None].expand_as(loss))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_2_with_advantage_one_it_is_ordinary_flow_matching(make, sign):
    backend = make(likelihood={"weighting": "uniform"})
    move(backend)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups, [sign] * 4)
    _, loss = policy_loss(backend, batch)
    found = gradient_of(backend, loss.mean())
    rows = backend._decisions.fold(batch.payload, CPU)
    velocity = backend._policy(rows)
    ordinary = (velocity - (rows.detail.noise - rows.detail.x0)).square().mean()
    expected = gradient_of(backend, ordinary)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], sign * value, rtol=1e-4, atol=1e-6)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-3


def test_4_both_reductions_have_the_same_gradient_on_policy(make):
    backend = make()
    move(backend)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups, [1.0, -0.5, 0.25, -1.0])
    one, other = (
        gradient_of(backend, policy_loss(backend, batch, importance)[1].mean())
        for importance in ("decision", "sample")
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-8)


def test_7_equal_rewards_give_no_policy_gradient(make):
    backend = make()
    groups = list(backend.rollout(make_requests()))
    rewards = torch.tensor([0.5, 0.5, 0.0, 1.0], dtype=torch.float64)
    scores = Scores(
        combined=rewards, group=torch.tensor([0, 0, 1, 1]), valid=torch.ones(4, dtype=torch.bool)
    )
    advantages, _ = group_advantage.estimate(scores, group_advantage.Config(), {})
    assert advantages.values[2:].sum().item() == pytest.approx(0)
    for group, rows, moved in ((groups[0], slice(0, 2), False), (groups[1], slice(2, 4), True)):
        batch = make_batch(backend, [group], advantages.values[rows])
        found = gradient_of(backend, policy_loss(backend, batch)[1].mean())
        assert any(bool(value.any()) for value in found.values()) == moved


# Reference and averages


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_5_gaps_are_zero_at_the_start_and_have_a_gradient_after_a_step(make, lora):
    backend = make(lora=lora)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    terms = backend.evaluate(batch, ALL_TERMS)
    assert not terms.velocity_gap_reference.any()
    assert not terms.velocity_gap_ema.any()
    move(backend, 0.02)
    for name in ("velocity_gap_reference", "velocity_gap_ema"):
        gap = backend.evaluate(batch, ALL_TERMS).need(name)
        assert (gap > 0).all()
        found = gradient_of(backend, gap.mean())
        assert max(float(value.abs().max()) for value in found.values()) > 1e-6


def test_the_gap_gradient_is_that_of_the_policy_side(make):
    """Finite difference of the gap along a direction in parameter space."""
    backend = make()
    move(backend)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    backend._take_copies()
    gap = backend.evaluate(batch, ALL_TERMS).velocity_gap_reference.mean()
    slope = gradient_of(backend, gap)
    norm = sum(float(value.square().sum()) for value in slope.values()) ** 0.5
    h, values = 1e-3, []
    for sign in (1, -2):
        with torch.no_grad():
            for name, parameter in trainable(backend.model).items():
                parameter.add_(sign * h * slope[name] / norm)
            values.append(backend.evaluate(batch, ALL_TERMS).velocity_gap_reference.mean().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(norm, rel=0.02)


def test_reference_is_the_loaded_model(make):
    backend, untouched = make(), make()
    requests = make_requests()
    move(backend)
    flags = {name: p.requires_grad for name, p in backend.model.named_parameters()}
    with backend._reference():
        inside = {name: p.requires_grad for name, p in backend.model.named_parameters()}
        reference = latents(backend.rollout(requests))
    assert inside == flags
    assert torch.equal(reference, latents(untouched.rollout(requests)))
    assert not torch.allclose(reference, latents(backend.rollout(requests)))


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_ema_follows_its_schedule(make, lora):
    backend = make(lora=lora, likelihood={"ema": {"max_decay": 0.5, "rate": 0.1}})
    next(backend.rollout(make_requests()))
    live = trainable(backend.model)
    expected = {name: value.detach().clone() for name, value in live.items()}
    for step in (0, 1, 2, 9):
        move(backend, seed=step)
        backend.after_update(step)
        decay = min(0.5, 0.1 * step)
        for name, value in live.items():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
        with backend._with_copy("ema"):
            for name, value in live.items():
                torch.testing.assert_close(value.detach(), expected[name], rtol=1e-6, atol=1e-7)


def test_behaviour_and_average_are_other_weights_only_where_asked(make):
    on_policy = make(needs={"logp"})
    assert not on_policy.off_policy
    assert on_policy.auxiliary_state() == {}
    likelihood = {"behaviour": "ema", "evaluation_ema_decay": 0.9}
    off_policy = make(needs={"logp"}, likelihood=likelihood)
    assert off_policy.off_policy
    requests = make_requests()
    start = latents(off_policy.rollout(requests))
    for backend in (on_policy, off_policy):
        move(backend)
        live = latents(backend.rollout(requests))
        for context in (backend.behaviour, backend.averaged):
            with context():
                found = latents(backend.rollout(requests))
            assert torch.equal(found, live if backend is on_policy else start)
        assert torch.equal(latents(backend.rollout(requests)), live)


def test_off_policy_ratio_differs_from_one(make):
    backend = make(likelihood={"behaviour": "ema"})
    with backend.behaviour():
        groups = list(backend.rollout(make_requests()))
    move(backend)
    batch = make_batch(backend, groups, [1.0] * 4)
    with torch.no_grad(), backend.behaviour():
        old = backend.evaluate(batch, LOGP).logp
        assert torch.equal(backend.evaluate(batch, LOGP).logp, old)
    terms = backend.evaluate(batch, LOGP)
    assert ((terms.logp - old).abs() > 1e-5).all()


def test_evaluation_average(make):
    backend = make(needs={"logp"}, likelihood={"evaluation_ema_decay": 0.9})
    backend.auxiliary_state()
    live = trainable(backend.model)
    start = {name: value.detach().clone() for name, value in live.items()}
    move(backend)
    backend.after_update(0)  # decay 0.1
    with backend.averaged():
        averaged = {name: value.detach().clone() for name, value in live.items()}
    for name, value in live.items():
        expected = 0.1 * start[name] + 0.9 * value.detach()
        found = backend.auxiliary_state()[f"average:{name}"]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(averaged[name], found)


def test_a_copy_that_was_not_asked_for_is_refused(make):
    backend = make(needs={"logp"})
    groups = list(backend.rollout(make_requests()))
    with pytest.raises(ValueError, match="no 'ema' copy"):
        backend.evaluate(make_batch(backend, groups), ALL_TERMS)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_auxiliary_state_survives_a_checkpoint(make, lora):
    likelihood = {"evaluation_ema_decay": 0.9}
    one = make(lora=lora, likelihood=likelihood)
    next(one.rollout(make_requests()))
    move(one)
    one.after_update(3)
    saved = {name: value.clone() for name, value in one.auxiliary_state().items()}
    assert {name.split(":")[0] for name in saved} == (
        {"ema", "average"} if lora else {"ema", "average", "reference"}
    )
    other = make(lora=lora, likelihood=likelihood)
    other.model.load_state_dict(one.model.state_dict())
    other.load_auxiliary_state(saved)
    assert all(torch.equal(value, saved[key]) for key, value in other.auxiliary_state().items())
    batch = make_batch(one, list(one.rollout(make_requests())))
    a, b = (backend.evaluate(batch, ALL_TERMS) for backend in (one, other))
    assert torch.equal(a.velocity_gap_reference, b.velocity_gap_reference)
    assert torch.equal(a.velocity_gap_ema, b.velocity_gap_ema)
    with pytest.raises(ValueError, match=r"saved copies \['ema'\]"):
        other.load_auxiliary_state({k: v for k, v in saved.items() if k.startswith("ema")})
    drawing = make(lora=lora, likelihood=likelihood, needs=())
    drawing.load_auxiliary_state(saved)
    kept = drawing.auxiliary_state()
    assert {name.split(":")[0] for name in kept} == {"average"}
    assert all(torch.equal(value, saved[key]) for key, value in kept.items())


def test_velocity_norm_metrics_leave_padding_out(make):
    backend = make()
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups)
    rows = backend._decisions.fold(batch.payload, CPU)
    with torch.no_grad():
        norm = backend._policy(rows).square().mean((1, 2, 3))
    norm = norm.view(2, 4).T
    half = replace(batch, weights=torch.tensor([1.0, 0, 0, 1], dtype=torch.float64))
    metrics = backend.evaluate(half, ALL_TERMS).metrics
    assert metrics["velocity_norm"] == (pytest.approx(float(norm[[0, 3]].sum()), rel=1e-5), 4.0)
    assert metrics["velocity_norm_ratio"] == (pytest.approx(4.0), 4.0)
    assert "velocity_norm_ratio" not in backend.evaluate(half, LOGP).metrics


# Forms of the model


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_precisions(make, dtype, lora):
    backend = make(dtype=dtype, lora=lora)
    groups = list(backend.rollout(make_requests()))
    batch = make_batch(backend, groups, [1.0, -1.0, 0.5, -0.5])
    terms, loss = policy_loss(backend, batch)
    loss.mean().backward()
    assert terms.logp.dtype == torch.float64
    assert latents(groups).dtype == torch.float32
    assert latents(groups).isfinite().all()
    assert {p.dtype for p in trainable(backend.model).values()} == {torch.float32}
    exact = make(lora=lora).evaluate(batch, LOGP).logp
    torch.testing.assert_close(terms.logp, exact, rtol=0.03, atol=0.03)  # bf16: 3 digits
    frozen = {p.dtype for p in backend.model.parameters() if not p.requires_grad}
    stored = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert frozen == ({stored} if lora else set())


def test_adapters_are_fed_half_precision_as_it_is_with_the_same_result(make):
    """peft would widen their inputs to float32, which autocast narrows again."""
    backend = make(dtype="bf16", lora={"rank": 4, "alpha": 8})
    move(backend)
    batch = make_batch(backend, list(backend.rollout(make_requests())), [1.0, -1.0, 0.5, 2.0])
    adapters = [m for n, m in backend.model.named_modules() if n.endswith("lora_A.default")]
    seen = set()
    for adapter in adapters:
        adapter.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    found = []
    for widened in (False, True):
        for module in backend.model.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                assert widened or module.cast_input_dtype_enabled is False
                module.cast_input_dtype_enabled = widened
        seen.clear()
        terms = backend.evaluate(batch, LOGP)
        assert seen == {torch.float32 if widened else torch.bfloat16}
        found.append({"logp": terms.logp} | gradient_of(backend, terms.logp.sum()))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_full_fine_tuning_starts_from_the_unrounded_weights(make):
    exact = make(lora=None).model.state_dict()
    found = make(lora=None, dtype="bf16").model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in exact.items())


def test_swapped_weights_do_not_leak_through_the_autocast_cache(make):
    backend = make(dtype="bf16", lora=None)
    batch = make_batch(backend, list(backend.rollout(make_requests())))
    move(backend)
    with torch.autocast("cpu", torch.bfloat16):  # a caller's own context keeps casts alive
        terms = backend.evaluate(batch, ALL_TERMS)
    assert (terms.velocity_gap_ema > 0).all()
    found = gradient_of(backend, terms.logp.sum())
    assert all(bool(value.any()) for name, value in found.items() if name.endswith("to_q.weight"))


def test_gradient_checkpointing_changes_nothing_but_memory(make):
    plain, recomputed = make(), make(gradient_checkpointing=True)
    assert recomputed.model.gradient_checkpointing
    batch = make_batch(plain, list(plain.rollout(make_requests())), [1.0, -1.0, 0.5, 2.0])
    found = []
    for backend in (plain, recomputed):
        move(backend)
        found.append(gradient_of(backend, policy_loss(backend, batch)[1].mean()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("init", ["gaussian", "default"])
def test_adapters_start_without_effect_and_from_the_seed(make, init):
    lora = {"rank": 4, "alpha": 8, "init": init}
    state = torch.get_rng_state()
    one, same, other = make(lora=lora), make(lora=lora), make(lora=lora, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    parameters = [trainable(backend.model) for backend in (one, same, other)]
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name])
        assert torch.equal(value, parameters[2][name]) == ("lora_B" in name)
    wide = torch.cat([v.flatten() for n, v in parameters[0].items() if "lora_A" in n]).abs().max()
    # Kaiming-uniform on 32 inputs is bounded by sqrt(1/32); N(0, 1/4) is not.
    assert (wide < 0.18) == (init == "default")


def test_default_adapters_sit_on_both_streams_of_joint_attention(make):
    layers = {name.split(".lora_")[0] for name in trainable(make().model)}
    found = {name.split("transformer_blocks.0.")[1] for name in layers if "blocks.0" in name}
    joint = {"to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"}
    assert found == {f"attn.{name}" for name in (*joint, "to_add_out")}


def test_a_wrapped_model_is_the_one_that_is_called(make):
    backend = make()
    calls = []

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **inputs):
            calls.append(inputs["hidden_states"].shape[0])
            return self.inner(**inputs)

    backend.model = Wrapper(backend.model)
    groups = list(backend.rollout(make_requests()))
    assert calls == [4] * 4
    backend.evaluate(make_batch(backend, groups), ALL_TERMS)
    assert calls[4:] == [8] * 3
    backend.after_update(1)


def test_conditions_repeat_level_by_level():
    rows = [Condition(text=torch.full((1, 1, 1), v), pooled=torch.full((1, 1), v)) for v in (1, 2)]
    repeated = Condition.stack(rows, torch.device("cpu")).repeat(3)
    assert repeated.text.flatten().tolist() == [1, 2] * 3
    assert repeated.pooled.flatten().tolist() == [1, 2] * 3
