"""Which decisions are trained: one threshold for all processes, ties together, padding nowhere."""

from __future__ import annotations

import math

import pytest
import torch

from mmrl import selecting
from mmrl.config import Part
from mmrl.selection.d3s import Config
from mmrl.types import PolicyTerms, Prompt, RolloutGroup, RolloutRequest
from mmrl.windows import MicroBatch, Sample

NAN = float("nan")
MASK = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
ENTROPY = torch.tensor([[1.0, 3.0, NAN], [0.5, 2.0, 0.25], [4.0, NAN, -9.0]])
VALUES = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
D3S = Part("selection", "d3s", Config())


def group(mask=MASK):
    request = RolloutRequest(
        prompt=Prompt(id="p", text="p"), group_size=len(mask), seed=0, stream=0, index=0
    )
    return RolloutGroup(request=request, outputs=[""] * len(mask), payload=None, mask=mask)


def asked(places, decisions=slice(0, None), filler=False):
    """What the policy said of some samples, as if in one micro-batch."""
    whole = group()
    samples = [Sample(whole, i, i, weight=0.0 if filler else 1.0) for i in places]
    logp = torch.zeros(len(places), 3)[:, decisions]
    terms = PolicyTerms(logp=logp, entropy=ENTROPY[list(places)][:, decisions])
    return MicroBatch(samples, decisions), terms


def keys(*batches):
    return selecting.keys_of(D3S, batches, VALUES)


def test_keys_stand_at_trained_decisions_only():
    found = keys(asked([0, 1, 2]))
    assert found[0].tolist() == [2.0, 6.0, -math.inf]
    assert found[1].tolist() == [0.5, 2.0, 0.25]
    assert found[2].tolist() == [2.0, -math.inf, -math.inf]


def test_neither_order_nor_split_nor_work_for_nothing_matters():
    expected = keys(asked([0, 1, 2]))
    cut = [asked([2, 0], slice(0, 2)), asked([2, 0], slice(2, 3)), asked([1])]
    for batches in ([asked([2]), asked([1, 0])], cut, [asked([0, 1, 2]), asked([1], filler=True)]):
        found = keys(*batches)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[i], expected[i]) for i in expected)


class Processes:
    """An accelerator's stand-in: what other processes hand in is known."""

    def __init__(self, monkeypatch, *others):
        monkeypatch.setattr(selecting, "gather_items", lambda accelerator, items: [*items, *others])


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (1.0, [[True, True, False], [True, True, True], [True, False, False]]),
        # Of six keys 6, 2, 2, 2, 0.5, 0.25: the first; then all that are equal.
        (0.01, [[False, True, False], [False, False, False], [False, False, False]]),
        (0.3, [[True, True, False], [False, True, False], [True, False, False]]),
        (0.7, [[True, True, False], [True, True, False], [True, False, False]]),
    ],
)
def test_the_largest_keys_are_kept_with_all_that_equal_the_last(monkeypatch, share, expected):
    Processes(monkeypatch)
    kept = selecting.largest(None, keys(asked([0, 1, 2])), {}, share)
    assert [kept[i].tolist() for i in range(3)] == expected
    total = sum(map(sum, expected))
    assert selecting.metrics(keys(asked([0, 1, 2])), kept) == {"selection/decisions": (total, 6)}


def test_the_threshold_is_that_of_all_processes(monkeypatch):
    mine = keys(asked([0, 1]))
    others = keys(asked([2]))
    Processes(monkeypatch, torch.tensor([2.0]))
    kept = selecting.largest(None, mine, {}, 0.3)
    Processes(monkeypatch)
    alone = selecting.largest(None, mine | others, {}, 0.3)
    assert all(torch.equal(kept[i], alone[i]) for i in mine)


def test_a_second_selection_looks_at_what_the_first_left(monkeypatch):
    Processes(monkeypatch)
    given = keys(asked([0, 1, 2]))
    first = selecting.largest(None, given, {}, 0.7)
    second = selecting.largest(None, given, first, 0.2)
    assert [second[i].tolist() for i in range(3)] == [
        [False, True, False],
        [False, False, False],
        [False, False, False],
    ]
    assert selecting.largest(None, {}, {}, 0.5) == {}


def test_a_sample_without_the_dropped_decisions_has_a_smaller_mask():
    row = Sample(group(), 1, 1, kept=torch.tensor([True, False, True]))
    assert row.mask.tolist() == [True, False, True]
    batch = MicroBatch([row, Sample(group(), 0, 0)], slice(0, None))
    assert batch.whole_mask.tolist() == [[True, False, True], [True, True, False]]
    assert batch.drawn.tolist() == [[True, True, True], [True, True, False]]
