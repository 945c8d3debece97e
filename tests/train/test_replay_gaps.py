"""What the preflight says of a replay: how far from the rollout, decision by decision."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_recipes import ROOT, short

from diffusion.backend import DiffusionBackend
from mmrl.config import load
from mmrl.errors import UserError
from mmrl.replay_gaps import Gaps, gap_line, refuse_gap, refuse_gaps
from mmrl.runner import make_trainer, open_session


@pytest.mark.parametrize(
    ("gap", "precision", "clip", "bound"),
    [
        (5e-7, "no", None, None),
        (5e-7, "no", 1e-6, "1e-07"),
        (0.9e-7, "no", 1e-6, None),
        (2e-6, "no", 0.2, "1e-06"),  # a wide clip range widens no budget
        (2e-6, "no", None, "1e-06"),
        (5e-3, "bf16", None, None),
        (5e-3, "bf16", 1e-4, "1e-05"),
        (5e-3, "fp16", None, "2e-03"),
        (math.nan, "bf16", None, "1e-02"),
    ],
)
def test_a_gap_is_bound_by_precision_and_clip_range(gap, precision, clip, bound):
    if bound is None:
        refuse_gap(gap, precision, clip)
    else:
        with pytest.raises(UserError, match=f"log-ratio of {gap:.3g}, more than {bound}:"):
            refuse_gap(gap, precision, clip)


def test_the_clip_range_binds_what_ratios_start_from():
    rounded = [0.0, 3e-4]
    refuse_gaps(Gaps(rollout=rounded, replay=[0.0, 0.0]), "bf16", 1e-4)
    refuse_gaps(Gaps(rollout=[0.0, 0.3], replay=[0.0, 0.0]), "bf16", 1e-4)
    refuse_gaps(Gaps(), "bf16", 1e-4)
    with pytest.raises(UserError, match="replaying a rollout"):
        refuse_gaps(Gaps(rollout=[0.0, 2e-6], replay=[0.0, 0.0]), "no")
    for wrong in (
        Gaps(rollout=rounded),
        Gaps(replay=rounded),
        Gaps(rollout=[0.0, 0.0], replay=rounded),
        Gaps(rollout=[0.0, math.nan], replay=[0.0, 0.0]),
    ):
        with pytest.raises(UserError, match="replaying a rollout"):
            refuse_gaps(wrong, "bf16", 1e-4)


def test_the_line_names_the_gap_by_decision():
    start = "replay of a rollout: largest |log-ratio| "
    line = gap_line(Gaps(rollout=[1e-7, 2.4e-4, 0.0], replay=[0.0, 0.0, 0.0]))
    assert line == start + (
        "2.4e-04 (by decision: 1e-07 2e-04 0e+00) to the rollout; 0.0e+00 to another replay"
    )
    assert gap_line(Gaps(rollout=[0.0, 0.0])) == start + "0.0e+00 to the rollout"
    assert gap_line(Gaps(replay=[3e-9])) == start + "3.0e-09 to another replay"


def guard(folder, dtype):
    """A run of GRPO-Guard, whose ratios never start from the rollout's log-probabilities."""
    recipe = ROOT / "configs" / "diffusion" / "tiny-sd3" / "grpo-guard.yaml"
    changes = (f"backend.model.dtype={dtype}", "backend.rollout.batch_size=5")
    return make_trainer(open_session(load(recipe, short(recipe, folder, folder, *changes))))


@pytest.mark.parametrize(("dtype", "budget"), [("fp32", 1e-6), ("bf16", 1e-2)])
def test_half_precision_and_grpo_guard_are_compared_with_the_rollout(tmp_path, dtype, budget):
    trainer = guard(tmp_path, dtype)
    trainer.step()
    found = trainer.replay_gap
    assert found is not None
    assert found.rollout is not None
    assert found.replay is not None
    assert len(found.rollout) == len(found.replay) == 9
    # Rollouts stand in batches of five, the replay in batches of another size.
    assert max(found.rollout) <= budget
    assert max(found.replay) <= 1e-7
    assert "to the rollout" in gap_line(found)


@pytest.mark.parametrize(("dtype", "error"), [("fp32", 1e-4), ("bf16", 0.5)])
def test_log_probabilities_that_the_rollout_got_wrong_are_seen(tmp_path, monkeypatch, dtype, error):
    """In float32 they are refused; in half precision a person is told."""
    own = DiffusionBackend.rollout

    def wrong(self, requests, *, evaluation=False):
        shift = torch.tensor([0.0] * 8 + [error])
        for group in own(self, requests, evaluation=evaluation):
            assert group.logp_old is not None
            yield replace(group, logp_old=group.logp_old + shift)

    monkeypatch.setattr(DiffusionBackend, "rollout", wrong)
    trainer = guard(tmp_path, dtype)
    if dtype == "fp32":
        with pytest.raises(UserError, match="replaying a rollout at unchanged weights"):
            trainer.step()
    else:
        trainer.step()
        assert "5.0e-01 (by decision" in gap_line(trainer.replay_gap)
