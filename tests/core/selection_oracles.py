"""Loop oracles of selection, and checks of modules against them."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from core_oracles import close, entries, float64, random_case
from pydantic import ValidationError
from torch import Tensor

from mmrl.errors import UserError
from mmrl.noise import generator
from mmrl.types import Advantages, Moment, Scores

GROUP = torch.tensor([5, 2, 5, 5, 2, 9, 2, 5, 2, 5, 9])
KEEP = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
VALUES = (0.3, -2.0, 1.1, -0.4, 0.9, 0.2, -0.1, 1.7, 0.6, 0.0, -1.3)
REWARDS = (0.5, -1.0, 2.0, 0.7, -0.4, 1.0, 3.0, -0.2, 0.1, 9.0, 0.4)
MIDWAY = Moment(step=3, num_steps=10, seed=0)


def step() -> tuple[Advantages, Scores]:
    """11 samples of three groups; one is not kept."""
    given = Advantages(values=float64(VALUES), keep=KEEP, metrics={"m": 1.0})
    return given, Scores(combined=float64(REWARDS), group=GROUP, valid=KEEP)


def widest_rows(rows: list[int], count: int) -> set[int]:
    """Those of ``rows`` whose values vary most, by trying every choice."""
    tries = itertools.combinations(rows, count)
    return set(max(tries, key=lambda some: statistics.pvariance(VALUES[i] for i in some)))


def rows_of(mask: Tensor) -> set[int]:
    return set(mask.nonzero()[:, 0].tolist())


def check_kept(module: ModuleType) -> None:
    given, _ = step()
    keep = KEEP & (GROUP == 5)
    counts = torch.arange(1.0, 12.0).double()
    for earlier, times, wanted in (
        (None, None, None),
        (counts, None, counts),
        (None, counts, counts),
    ):
        out = module.narrowed(replace(given, counts=earlier), keep, times)
        close(out.values, [v if kept else 0 for v, kept in zip(VALUES, keep.tolist(), strict=True)])
        assert torch.equal(out.keep, keep)
        assert out.counts is wanted
        assert out.metrics == {"m": 1.0, "selection/samples": 4 / 10}
    nothing = replace(given, keep=torch.zeros_like(KEEP))
    assert module.narrowed(nothing, nothing.keep).metrics["selection/samples"] == 0


def check_d3s(module: ModuleType) -> None:
    given, scores = step()
    kept = [i for i in range(11) if KEEP[i]]
    for scope, parts in (
        ("step", [kept]),
        ("group", [[i for i in kept if GROUP[i] == g] for g in (5, 2, 9)]),
    ):
        # At 3 of 10 steps: a share of 0.44 and 0.72.
        for start, end, share in ((0.2, 1.0, 0.44), (0.9, 0.3, 0.72)):
            config = module.Config(scope=scope, samples_start=start, samples_end=end)
            sizes = [min(len(p), max(2, math.floor(share * len(p) + 0.5))) for p in parts]
            wanted = set().union(*map(widest_rows, parts, sizes))
            found = module.select(given, scores, MIDWAY, config)
            assert rows_of(found.keep) == wanted
            close(found.values[found.keep], [VALUES[i] for i in sorted(wanted)])
    zeros = replace(given, values=torch.zeros(11).double())
    for samples, decisions in ((0.5, 1.0), (1.0, 0.5), (1.0, 1.0)):
        config = module.Config(
            samples_start=samples,
            samples_end=samples,
            decisions_start=decisions,
            decisions_end=decisions,
        )
        assert module.decision_share(MIDWAY, config) == decisions
        left = module.select(zeros, scores, MIDWAY, config).keep
        assert rows_of(left) == (set(kept) if samples == decisions else set())
        assert module.needs(config) == ({"logp", "entropy"} if decisions < 1 else set())
    assert module.needs(module.Config(decisions_start=1.0, decisions_end=0.9))
    close(module.decision_share(MIDWAY, module.Config()), 0.7 * 0.2 + 0.3 * 1.0)
    check_keys(module, lambda size, entropy: abs(size) * entropy)


def check_keys(module: ModuleType, key) -> None:
    """Of each decision, from the advantage and the entropy."""
    terms, batch = random_case()
    found = module.decision_keys(batch.advantages, terms, module.Config())
    for b, k in entries(batch.mask):
        close(found[b, k], key(batch.advantages[b].item(), terms.entropy[b, k].item()))


def check_entropy_quantile(module: ModuleType) -> None:
    given, scores = step()
    for share, wanted in ((0.3, {"logp", "entropy"}), (1.0, set())):
        config = module.Config(share=share)
        assert module.needs(config) == wanted
        assert module.decision_share(MIDWAY, config) == share
    assert torch.equal(module.select(given, scores, MIDWAY, config).keep, KEEP)
    check_keys(module, lambda size, entropy: entropy)


def check_pf_ppo(module: ModuleType) -> None:
    """Rewards differ, so that only draws are left to chance: those of the same generator."""
    given, scores = step()
    parts = {g: [i for i in range(11) if KEEP[i] and GROUP[i] == g] for g in (5, 2, 9)}
    ranked = {g: sorted(rows, key=lambda i: -REWARDS[i]) for g, rows in parts.items()}
    for strategy, of_best in (("bon", (0,)), ("bw", (0, -1))):
        out = module.select(given, scores, MIDWAY, module.Config(strategy=strategy))
        assert rows_of(out.keep) == {rows[i] for rows in ranked.values() for i in of_best}
        assert out.counts is None
        twice = replace(given, counts=torch.full((11,), 2.0).double())
        again = module.select(twice, scores, MIDWAY, module.Config(strategy=strategy))
        assert again.counts.tolist() == (2.0 * out.keep).tolist()
    for seed in range(20):
        kept = set()
        for group, rows in ranked.items():
            draw = shuffled(seed, group, len(rows))
            other = 1 + int(torch.randint(len(rows) - 1, (), generator=draw))
            kept |= {rows[0], rows[other]}
        moment = replace(MIDWAY, seed=seed)
        assert rows_of(module.select(given, scores, moment, module.Config()).keep) == kept
    for strategy in ("bon", "bw", "br", "pow"):
        check_draws(module, ranked, strategy)
    draw = torch.Generator().manual_seed(0)
    flat = module.times(torch.zeros(50).double(), module.Config(strategy="pow", mode="draw"), draw)
    assert flat.sum() == 50
    assert module.times(float64([1.0]), module.Config(), draw).tolist() == [1.0]
    with pytest.raises((UserError, ValidationError), match="keeps every sample with strategy"):
        module.Config(strategy="pow")
    assert module.needs(module.Config()) == set()


def shuffled(seed: int, group: int, size: int) -> torch.Generator:
    """A group's generator after the shuffle that orders equal rewards."""
    draw = generator(seed, MIDWAY.step, "pf_ppo", group)
    torch.randperm(size, generator=draw)
    return draw


def check_draws(module: ModuleType, ranked: dict[int, list[int]], strategy: str) -> None:
    """``ranked``: rows of each group, best first."""
    given, scores = step()
    out = module.select(given, scores, MIDWAY, module.Config(strategy=strategy, mode="draw"))
    wanted = [0.0] * 11
    for group, best_first in ranked.items():
        rows, weights = sorted(best_first), []
        for i in rows:
            marked = i == best_first[0] or (strategy == "bw" and i == best_first[-1])
            by_rank = 0.4 if marked else 0.1 if strategy == "br" else 0.0
            weights.append(REWARDS[i] ** 2 if strategy == "pow" else by_rank)
        draw = shuffled(MIDWAY.seed, group, len(rows))
        drawn = float64(weights).multinomial(len(rows), replacement=True, generator=draw)
        for place in drawn.tolist():
            wanted[rows[place]] += 1
    assert out.counts.tolist() == wanted
    assert rows_of(out.keep) == {i for i, count in enumerate(wanted) if count}


def check_reliability(module: ModuleType) -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(23, dtype=torch.float64, generator=draw)
    truths = rewards + torch.randn(23, dtype=torch.float64, generator=draw)
    for bins in (4, 10):
        order = sorted(range(23), key=lambda i: rewards[i].item())
        parts, start = [], 0
        for k in range(bins):
            size = 23 // bins + (k < 23 % bins)
            parts.append(order[start : start + size])
            start += size
        x, y = (
            [statistics.fmean(values[i].item() for i in part) for part in parts]
            for values in (rewards, truths)
        )
        close(module.reliability(rewards, truths, bins), statistics.correlation(x, y) ** 2, 1e-9)
    assert module.reliability(rewards[:3], truths[:3]) <= 1


# Not of ``_widest``: of centred values the sum is 0, so that one of its mutants is itself; see
# ``test_d3s``.
CHECKS = {
    "mmrl.selection._kept": check_kept,
    "mmrl.selection.d3s": check_d3s,
    "mmrl.selection.entropy_quantile": check_entropy_quantile,
    "mmrl.selection.pf_ppo": check_pf_ppo,
    "mmrl.selection._reliability": check_reliability,
}
