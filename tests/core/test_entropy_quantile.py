"""The entropy quantile: which decisions reach it, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from core_oracles import float64
from pydantic import ValidationError

from mmrl import selecting
from mmrl.config import Part
from mmrl.selection.entropy_quantile import Config, decision_keys, decision_share, needs, select
from mmrl.types import Advantages, Moment, PolicyTerms, Prompt, RolloutGroup, RolloutRequest, Scores
from mmrl.windows import MicroBatch, Sample

MOMENT = Moment(step=3, num_steps=10, seed=0)
# TRL's own example: twelve tokens, two of them padding.
ENTROPY = torch.tensor([[0.1, 0.2, 0.3, 1.4, 0.5, 0.14], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0]])
MASK = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


def kept(monkeypatch, share, split=((0, 1),)):
    """[2, 6] bool: what is trained of the example, asked in micro-batches of these samples."""
    monkeypatch.setattr(selecting, "gather_items", lambda accelerator, items: items)
    request = RolloutRequest(
        prompt=Prompt(id="p", text="p"), group_size=2, seed=0, stream=0, index=0
    )
    group = RolloutGroup(request=request, outputs=["", ""], payload=None, mask=MASK)
    asked = [
        (
            MicroBatch([Sample(group, i, i) for i in rows], slice(0, None)),
            PolicyTerms(logp=torch.zeros(len(rows), 6), entropy=ENTROPY[list(rows)]),
        )
        for rows in split
    ]
    part = Part("selection", "entropy_quantile", Config(share=share))
    keys = selecting.keys_of(part, asked, float64([0.0, -2.0]))
    found = selecting.largest(None, keys, {}, decision_share(MOMENT, part.config))  # type: ignore
    return torch.stack([found[0], found[1]])


@pytest.mark.parametrize("split", [((0, 1),), ((1,), (0,))])
@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.2, [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]),
        (0.4, [[0, 0, 0, 1, 0, 0], [0, 1, 1, 1, 0, 0]]),
        (1.0, [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
    ],
)
def test_the_most_uncertain_decisions_of_the_step_are_kept(monkeypatch, split, share, expected):
    """Whatever their advantages, padding never, and wherever samples are evaluated."""
    assert kept(monkeypatch, share, split).int().tolist() == expected


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_it_is_the_quantile_of_trl(monkeypatch, share):
    """Where that does not lie between two decisions' entropies: then ceil(share n) are kept."""
    flat = ENTROPY[MASK]
    threshold = torch.quantile(flat, 1 - share, interpolation="higher")
    assert torch.equal(kept(monkeypatch, share)[MASK], flat >= threshold)


def test_samples_and_advantages_stay():
    given = Advantages(values=float64([0.3, 0.0, -0.3]), keep=torch.tensor([True, False, True]))
    scores = Scores(
        combined=torch.zeros(3).double(),
        group=torch.tensor([0, 0, 1]),
        valid=torch.ones(3).bool(),
    )
    out = select(given, scores, MOMENT, Config())
    assert torch.equal(out.keep, given.keep)
    assert torch.equal(out.values, given.values)
    assert out.counts is None
    assert out.metrics["selection/samples"] == 1.0


def test_keys_are_entropies_and_a_full_share_asks_for_nothing():
    terms = PolicyTerms(logp=torch.zeros(2, 6), entropy=ENTROPY)
    assert torch.equal(decision_keys(float64([5.0, 0.0]), terms, Config()), ENTROPY)
    assert needs(Config()) == {"logp", "entropy"}
    assert needs(Config(share=1.0)) == frozenset()
    assert decision_share(MOMENT, Config(share=1.0)) == 1.0


@pytest.mark.parametrize("share", [0, 1.1])
def test_shares_outside_their_range_are_named(share):
    with pytest.raises(ValidationError, match="share"):
        Config(share=share)
