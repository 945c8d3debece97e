"""Both forms of the distillation gradient against formulas, and the script end to end."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import opd_variance
from benchmarks.opd_variance import Means, agreement, closed_form, ppo_form
from mmrl.objectives import opd
from mmrl.types import UpdateBatch

SMALL = ("backend.rollout.num_steps=3",)


def linear_policy(rows=2, size=3, seed=0):
    """mu_S = W theta in float64: theta [P], W [rows, size, P], teacher's means and S."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    theta = normal(4).requires_grad_()
    maps, teacher = normal(rows, size, 4), normal(rows, size)
    means = Means(student=maps @ theta, teacher=teacher, std=normal(rows).abs() + 0.3)
    return theta, maps, means, normal(5, rows, size)


def gradient_of(loss, theta):
    return torch.autograd.grad(loss.sum(), theta, retain_graph=True)[0]


@pytest.mark.parametrize("baseline", [False, True])
def test_the_score_function_gradient_term_by_term(baseline):
    """D (logp_S - logp_T) grad logp_S with log-densities per dimension, in plain loops."""
    theta, maps, means, noise = linear_policy()
    found = gradient_of(ppo_form(means, noise, baseline=baseline), theta)
    expected = [0.0] * 4
    draws, rows, size = noise.shape
    for r in range(rows):
        s = float(means.std[r])
        mu, tau = means.student[r].tolist(), means.teacher[r].tolist()
        kl = sum((a - b) ** 2 for a, b in zip(mu, tau, strict=True)) / (2 * s**2)
        for m in range(draws):
            x = [mu[d] + s * float(noise[m, r, d]) for d in range(size)]
            cost = sum(
                ((x[d] - tau[d]) ** 2 - (x[d] - mu[d]) ** 2) / (2 * s**2) for d in range(size)
            ) - (kl if baseline else 0.0)
            for p in range(4):
                score = sum((x[d] - mu[d]) / s**2 * float(maps[r, d, p]) for d in range(size))
                expected[p] += cost * score / size / draws
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_the_closed_form_gradient_term_by_term():
    theta, maps, means, _ = linear_policy()
    found = gradient_of(closed_form(means), theta)
    expected = sum(
        maps[r].T @ (means.student[r] - means.teacher[r]) / (3 * means.std[r] ** 2)
        for r in range(2)
    )
    torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize(("baseline", "variance"), [(False, 56.25), (True, 50.0)])
def test_published_toy(baseline, variance):
    """mu_S = w = .3, mu_T = .1, S = .2: mean (w - m) / S^2 = 5, variance 56 for each draw.

    In z: g = (z + b) z / S with b = 1/2, or 0 with the baseline, so E g^2 = (3 + b^2) / S^2.
    """
    w = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rows = 200_000
    means = Means(
        student=w.expand(rows, 1),
        teacher=torch.full((rows, 1), 0.1, dtype=torch.float64),
        std=torch.full((rows,), 0.2, dtype=torch.float64),
    )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(1, rows, 1, generator=generator, dtype=torch.float64)
    mean = float(gradient_of(ppo_form(means, z, baseline=baseline), w)) / rows
    assert mean == pytest.approx(5.0, abs=4 * math.sqrt(variance / rows))
    each = (z * (z + (0 if baseline else 0.5)) / 0.2).flatten()  # the derivation in the docstring
    assert float(each.mean()) == pytest.approx(mean, rel=1e-9)
    assert float(each.var()) == pytest.approx(variance, rel=0.05)
    assert float(gradient_of(closed_form(means), w)) / rows == pytest.approx(5.0)


def test_agreement_of_known_noise():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(1.0, 41.0, dtype=torch.float64)
    noise = 3 * torch.randn(2000, 40, generator=generator, dtype=torch.float64)
    found = agreement(truth, truth + noise, draws=5)
    assert found.draws == 10_000
    assert found.cosine == pytest.approx(1, abs=1e-4)
    assert abs(found.relative_norm - 1) < 4 * found.norm_error
    assert found.norm_error == pytest.approx(3 / float(truth.norm()) / math.sqrt(2000), rel=0.1)
    assert found.distance == pytest.approx(found.expected_distance, rel=0.5)
    assert found.ratio == pytest.approx(5 * 40 * 9 / float(truth @ truth), rel=0.05)
    flipped = agreement(truth, noise - truth, draws=5)
    assert flipped.cosine < -0.99
    assert flipped.distance > 1.9


def test_squared_mean_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(20_000, 4, 30, generator=generator) + 0.1
    estimates = [opd_variance.squared_mean(rows) for rows in samples[:3000]]
    # The plain square would be 30 (0.01 + 1/4) = 7.8.
    assert sum(estimates) / 3000 == pytest.approx(0.3, abs=0.2)
    assert opd_variance.trace_of_covariance(samples[:, 0]) == pytest.approx(30, rel=0.05)


def test_the_closed_form_is_the_objective():
    options = Namespace(
        config=Path("configs/diffusion/tiny-sd3/flow-grpo.yaml"), overrides=SMALL, scale=0.02
    )
    backend, prompts = opd_variance.open_policies(options, 0)
    batch = opd_variance.roll_out(backend, prompts, 2, 0)[1]
    ours = opd_variance.gradient(backend, closed_form(opd_variance.means_of(backend, batch)).mean())
    update = UpdateBatch(
        payload=batch,
        mask=torch.ones(2, 1, dtype=torch.bool),
        advantages=torch.zeros(2, dtype=torch.float64),
        weights=torch.ones(2, dtype=torch.float64),
    )
    config = opd.Config()
    terms = backend.evaluate(update, opd.needs(config))
    theirs = opd_variance.gradient(backend, opd.loss(terms, update, config).loss.mean())
    assert float(theirs.norm()) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.norm()))


def test_the_whole_benchmark(tmp_path, capsys):
    options = ["--given", "2", "--blocks", "3", "--draws", "64", "--states", "3"]
    options += ["--seeds", "0", "1"]
    assert opd_variance.main([*options, "--out", str(tmp_path), *SMALL]) == 0
    (written,) = tmp_path.glob("*opd-variance*.json")
    seeds = json.loads(written.read_text())["seeds"]
    assert list(seeds) == ["0", "1"]
    for lines in seeds.values():
        assert [line["step"] for line in lines] == ["0", "1", "all"]
    for line in (line for lines in seeds.values() for line in lines):
        assert line["kl"] > 0
        assert line["given_states"]["PPO"]["ratio"] > 1
        assert line["over_states"]["PPO"] > 1
    first, other = (lines[-1]["given_states"]["PPO"]["ratio"] for lines in seeds.values())
    assert first != other, "other adapters, states and noise"
    report = capsys.readouterr().out
    assert "do the two agree" in report
    mean, std = (first + other) / 2, abs(first - other) / math.sqrt(2)
    assert f"| {mean:.0f} +- {std:.0f} |" in report


def test_too_many_states():
    with pytest.raises(SystemExit, match="5 states of each step, but only 1 prompts"):
        opd_variance.roll_out(None, [None], 5, 0)  # type: ignore[arg-type]
