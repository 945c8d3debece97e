"""The transition likelihood: what a rollout keeps, and what a replay makes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_sd3 import PROMPTS, make_batch, make_config, make_requests

from diffusion.kernels import step_table
from diffusion.schedule import sigma_grid
from mmrl.errors import UserError
from mmrl.objectives import grpo
from mmrl.weights import trainable

NEEDS = frozenset({"logp", "logp_ref", "mean_gap_old", "mean_gap_reference", "velocity_gap_ema"})
KERNELS = {"flow_sde": 0.7, "dance_sde": 0.3, "cps": 0.8}
ROLLOUT = {"num_steps": 6, "grid": "linspace_shifted", "batch_size": 8}


def likelihood(kernel="flow_sde", state_dtype="fp32", **steps):
    noise_level = KERNELS.get(kernel, 0.0)
    return {
        "name": "transition",
        "kernel": kernel,
        "noise_level": noise_level,
        "state_dtype": state_dtype,
        "steps": steps,
    }


@pytest.fixture
def backend_of(make):
    def backend_of(kernel="flow_sde", rollout=None, needs=NEEDS, state_dtype="fp32", **steps):
        return make(
            needs=needs,
            rollout=ROLLOUT | (rollout or {}),
            likelihood=likelihood(kernel, state_dtype, **steps),
        )

    return backend_of


def move(backend, scale=0.05):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def roll(backend, **request):
    return list(backend.rollout(make_requests(**request)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kernel", [*KERNELS, "ode"])
def test_a_replay_scores_exactly_what_the_rollout_scored(backend_of, kernel, guidance):
    backend = backend_of(kernel, rollout={"guidance": guidance})
    move(backend)
    groups = roll(backend)
    # One decision at a time: the forward has the shape that it had in the rollout.
    rows = [(group, i) for group in groups for i in range(2)]
    for decision in range(groups[0].mask.shape[1]):
        payload, mask = backend.collate(rows, slice(decision, decision + 1))
        batch = replace(make_batch(backend, groups), payload=payload, mask=mask)
        logp = backend.evaluate(batch, NEEDS).logp
        known = torch.cat([group.logp_old for group in groups])[:, decision : decision + 1]
        assert torch.equal(logp, known), (logp - known).abs().max()
        assert logp.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_logp_equals_a_loop_over_the_formula(backend_of, kernel):
    backend = backend_of(kernel)
    group = roll(backend, count=1)[0]
    move(backend)
    with torch.no_grad():
        terms = backend.evaluate(make_batch(backend, [group]), NEEDS)
    sigmas = sigma_grid("linspace_shifted", 6, 3.0)
    table = step_table(kernel, sigmas, KERNELS[kernel])
    condition = backend._conditions[PROMPTS[0].id]
    for b, path in enumerate(group.payload):
        for k, step in enumerate(path.steps.tolist()):
            before, after = path.states[step], path.states[step + 1]
            with torch.no_grad():
                v = backend.model(
                    hidden_states=before[None],
                    timestep=1000 * sigmas[step : step + 1],
                    encoder_hidden_states=condition.text,
                    pooled_projections=condition.pooled,
                ).sample[0]
            mean = table.x[step] * before.double() + table.velocity[step] * v.double()
            std = table.std[step]
            if kernel == "cps":
                expected = -(after - mean).square().mean()
            else:
                expected = torch.distributions.Normal(mean, std).log_prob(after.double()).mean()
            assert terms.logp[b, k].item() == pytest.approx(expected.item(), rel=1e-5)
            assert terms.step_std[b, k] == std
            assert terms.step_size[b, k].item() == pytest.approx(
                float(sigmas[step] - sigmas[step + 1]), rel=1e-6
            )


def test_states_follow_the_kernel_with_their_own_noise(backend_of):
    """x' - mu of a replayed step is S times standard normal noise that nobody else has."""
    backend = backend_of("flow_sde")
    groups = roll(backend, group_size=4)
    rows = backend._decisions.fold(make_batch(backend, groups).payload, torch.device("cpu"))
    with torch.no_grad():
        velocity = backend._policy(rows)
    detail, shape = rows.detail, (-1, 1, 1, 1)
    mean = detail.x.view(shape) * rows.states + detail.velocity.view(shape) * velocity
    z = ((detail.after - mean) / detail.std.view(shape)).flatten(1)
    assert z.mean().abs() < 0.05
    assert z.std().item() == pytest.approx(1.0, abs=0.05)
    similarity = z @ z.T / z.shape[1]
    assert (similarity - torch.eye(len(z))).abs().max() < 0.5


def test_neither_the_split_of_decisions_nor_of_samples_changes_a_score(backend_of):
    backend = backend_of("cps")
    groups = roll(backend)
    move(backend)
    whole = backend.evaluate(make_batch(backend, groups), NEEDS).logp
    rows = [(group, i) for group in groups for i in range(2)]
    for row, pair in enumerate(rows):
        for decision in range(whole.shape[1]):
            payload, mask = backend.collate([pair], slice(decision, decision + 1))
            one = make_batch(backend, groups, rows=[pair])
            found = backend.evaluate(replace(one, payload=payload, mask=mask), NEEDS).logp
            # Products of other shapes sum in another order.
            assert found.item() == pytest.approx(whole[row, decision].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"before": 3}, [0, 1, 2]),
        ({"select": "window", "size": 2, "start": 1}, [1, 2]),
    ],
)
def test_trained_steps(backend_of, steps, expected):
    backend = backend_of("flow_sde", **steps)
    groups = roll(backend)
    for path in (path for group in groups for path in group.payload):
        assert path.steps.tolist() == expected
        assert path.levels.tolist() == [*expected, expected[-1] + 1]
        assert len(path.states) == len(expected) + 1
    assert groups[0].mask.shape == (2, len(expected))
    assert backend.config.num_decisions == len(expected)


@pytest.mark.parametrize("select", ["window", "subset"])
def test_random_steps_are_drawn_anew_and_shared(backend_of, select):
    backend = backend_of("flow_sde", select=select, size=2, before=4)
    drawn = []
    for stream in range(12):
        paths = [p for group in roll(backend, stream=stream) for p in group.payload]
        steps = {tuple(path.steps.tolist()) for path in paths}
        assert len(steps) == 1
        drawn.append(steps.pop())
    assert {step for steps in drawn for step in steps} == {0, 1, 2, 3}
    gaps = {b - a for a, b in drawn}
    assert gaps == {1} if select == "window" else len(gaps) > 1


def test_each_sample_may_train_its_own_steps_if_all_steps_are_noisy(backend_of):
    backend = backend_of("dance_sde", select="subset", size=3, shared_by="sample", noise="all")
    groups = roll(backend, group_size=6)
    steps = {tuple(path.steps.tolist()) for group in groups for path in group.payload}
    assert len(steps) > 3
    batch = make_batch(backend, groups)
    logp = backend.evaluate(batch, NEEDS).logp
    torch.testing.assert_close(logp, torch.cat([g.logp_old for g in groups]), rtol=0, atol=1e-4)


def test_no_noise_is_drawn_outside_the_window(backend_of, monkeypatch):
    from diffusion import transition

    purposes = []
    normal = transition.noise.normal
    monkeypatch.setattr(
        transition.noise, "normal", lambda k, p, s: purposes.append(p) or normal(k, p, s)
    )
    steps = {"select": "window", "size": 2, "start": 1}
    window = roll(backend_of("flow_sde", **steps))
    assert [p for p in purposes if p != "initial"] == ["transition 1", "transition 2"]
    purposes.clear()
    roll(backend_of("flow_sde", **steps, noise="scorable"))
    assert len([p for p in purposes if p != "initial"]) == 5
    purposes.clear()
    everywhere = roll(backend_of("flow_sde", **steps, noise="all"))
    # The last step ends at sigma = 0, where flow_sde still has an S > 0.
    assert len([p for p in purposes if p != "initial"]) == 6
    first, other = (groups[0].payload[0] for groups in (window, everywhere))
    assert not torch.equal(first.states, other.states)


def test_without_noise_it_is_the_ode_of_the_evaluation(backend_of):
    backend = backend_of("ode")
    requests = make_requests()
    trained = [path.states[-1] for g in backend.rollout(requests) for path in g.payload]
    evaluated = torch.cat([g.payload.x0 for g in backend.rollout(requests, evaluation=True)])
    torch.testing.assert_close(torch.stack(trained), evaluated, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_state_is_rounded_before_it_is_scored(backend_of, dtype):
    backend = backend_of("flow_sde", state_dtype=dtype)
    groups = roll(backend)
    stored = groups[0].payload[0].states
    assert stored.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    logp = backend.evaluate(make_batch(backend, groups), NEEDS).logp
    # Scoring the sample before rounding would be off by far more than the order of sums.
    torch.testing.assert_close(logp, torch.cat([g.logp_old for g in groups]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shared", ["sample", "group"])
def test_initial_noise_may_be_shared_by_a_group(backend_of, shared):
    backend = backend_of("flow_sde", rollout={"initial_noise": shared})
    group, other = roll(backend)
    starts = [path.states[0] for path in group.payload]
    assert torch.equal(*starts) == (shared == "group")
    assert not torch.equal(starts[0], other.payload[0].states[0])
    assert not torch.equal(group.payload[0].states[1], group.payload[1].states[1])
    judged = next(backend.rollout(make_requests(), evaluation=True)).payload.x0
    assert not torch.equal(*judged)


def test_gaps_between_means_are_gaps_of_velocities_times_the_coefficient(backend_of):
    backend = backend_of("cps")
    groups = roll(backend)
    batch = make_batch(backend, groups)
    start = backend.evaluate(batch, NEEDS)
    assert not start.mean_gap_reference.any()
    assert torch.equal(start.logp, start.logp_ref)
    anchors = backend.anchor(batch, NEEDS)
    move(backend)
    remembered = replace(
        batch,
        logp_old=torch.stack([anchor.logp for anchor in anchors]),
        memory=[anchor.memory for anchor in anchors],
    )
    terms = backend.evaluate(remembered, NEEDS)
    terms.mean_gap_reference.mean().backward()
    assert any(bool(p.grad.any()) for p in trainable(backend.model).values())
    # The sampling policy was the untouched reference.
    torch.testing.assert_close(terms.mean_gap_old, terms.mean_gap_reference, rtol=1e-4, atol=1e-12)
    table = step_table("cps", sigma_grid("linspace_shifted", 6, 3.0), 0.8)
    steps = groups[0].payload[0].steps
    gap = backend.evaluate(batch, NEEDS | {"velocity_gap_reference"}).velocity_gap_reference
    expected = table.velocity[steps].square() * gap
    torch.testing.assert_close(terms.mean_gap_reference, expected, rtol=1e-5, atol=1e-12)
    assert (terms.mean_gap_old > 0).all()


def test_strictly_on_policy_the_old_mean_is_the_present_one(backend_of):
    backend = backend_of("flow_sde")
    groups = roll(backend)
    move(backend)
    assert not backend.evaluate(make_batch(backend, groups), NEEDS).mean_gap_old.any()


def test_the_clipped_objective_raises_what_was_rewarded(backend_of):
    """One small step of Flow-GRPO: rewarded transitions become likelier, the others less."""
    backend = backend_of("flow_sde")
    groups = roll(backend)
    batch = make_batch(backend, groups, [1.0, -1.0, 1.0, -1.0])
    terms = backend.evaluate(batch, NEEDS)
    grpo.loss(terms, batch, grpo.Config(clip_low=1e-4, clip_high=1e-4)).loss.mean().backward()
    with torch.no_grad():
        for parameter in trainable(backend.model).values():
            parameter.sub_(0.01 * parameter.grad)
        moved = backend.evaluate(batch, NEEDS).logp - terms.logp
    assert float((moved * batch.advantages[:, None]).mean()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 2}, "steps.size = 2 with select = 'all'"),
        ({"select": "window"}, "steps.size = None with select = 'window'"),
        ({"select": "window", "size": 7}, r"steps.size = 7; allowed: 1 to 5.*; step 5 ends at"),
        (
            {"select": "window", "size": 3, "before": 2},
            r"steps.size = 3; allowed: 1 to 2, the steps before step 2 \(steps.before\)",
        ),
        ({"select": "window", "size": 2, "start": 4}, "must lie within steps 0 to 4"),
        ({"select": "subset", "size": 2, "start": 1}, "needs select = 'window'"),
        ({"select": "subset", "size": 2, "shared_by": "sample"}, "different kernels"),
    ],
)
def test_choices_of_steps_that_cannot_be_made(tmp_path, change, message):
    with pytest.raises((UserError, ValueError), match=message):
        make_config(tmp_path, ROLLOUT, likelihood("flow_sde", **change))


@pytest.mark.parametrize(
    ("rollout", "change", "message"),
    [
        ({"scheduler": "dpmpp_2m"}, {}, "rollout.scheduler = 'dpmpp_2m' with likelihood"),
        ({}, {"kernel": "sde"}, "kernel"),
        ({}, {"noise_level": -1.0}, "noise_level"),
        ({}, {"noise_level": 0.0}, "each of the steps 0, 1, 2, 3, 4, 5 adds no noise.*noise_level"),
        ({}, {"kernel": "cps", "noise_level": 1.5}, "noise_level = 1.5 with kernel 'cps'"),
    ],
)
def test_kernels_that_cannot_be(tmp_path, rollout, change, message):
    with pytest.raises((UserError, ValueError), match=message):
        make_config(tmp_path, ROLLOUT | rollout, likelihood() | change)
