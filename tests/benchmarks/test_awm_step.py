"""The step benchmark measures every phase of a small run."""

from __future__ import annotations

import json

from benchmarks import awm_step

SMALL = (
    "training.prompts_per_step=2",
    "training.group_size=2",
    "training.micro_batch_size=2",
    "backend.rollout.num_steps=2",
    "backend.likelihood.num_times=1",
    "tracking.trackers=[]",
)


def test_every_phase_is_measured_and_counted(tmp_path, capsys):
    assert awm_step.main(["--steps", "1", "--out", str(tmp_path), *SMALL]) == 0
    (written,) = tmp_path.glob("*awm-step*.json")
    phases = {phase["name"]: phase for phase in json.loads(written.read_text())["phases"]}
    assert all(phase["seconds"] > 0 for phase in phases.values())
    rollout, update = phases["rollout alone"]["flops"], phases["update"]["flops"]
    # 4 images x 2 steps forward, against 4 x 1 level: policy forward and backward, two others.
    assert 1 < rollout / update < 3
    assert "share of the matmul rate" in capsys.readouterr().out
