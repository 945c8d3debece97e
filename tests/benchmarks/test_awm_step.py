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
    # 8 forwards and 4 decodings, against 4 forwards and backwards and 4 forwards of each of two
    # other networks, where the backward of an adapter costs between one and two forwards.
    assert 0.5 < rollout / update < 1.5
    assert "share of the matmul rate" in capsys.readouterr().out
