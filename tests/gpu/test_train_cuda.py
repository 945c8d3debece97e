"""Whole runs of the shipped tiny pipeline on CUDA."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmrl import runner
from mmrl.config import load

pytestmark = pytest.mark.gpu
SMALL = (
    "training.num_steps=2",
    "training.prompts_per_step=2",
    "training.group_size=4",
    "training.micro_batch_size=8",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "checkpoint.every=2",
    # The size of a file never ties, so every advantage counts.
    "rewards=[{name: jpeg_compressibility}]",
    "evaluation.rewards=[{name: jpeg_compressibility}]",
    "tracking.trackers=[]",
)


def small(folder, *overrides):
    output = f"output_dir={folder}/run"
    return load(Path("configs/quickstart.yaml"), [*SMALL, output, *overrides])


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_training_step_is_finite_and_moves_the_adapter(tmp_path, dtype):
    session = runner.open_session(small(tmp_path, f"backend.model.dtype={dtype}"))
    assert session.accelerator.device.type == "cuda"
    trainer = runner.make_trainer(session)
    trained = [p for p in session.backend.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    values = [trainer.step() for _ in range(3)][-1]
    trainer.scorer.close()
    assert all(p.dtype == torch.float32 for p in trained)
    assert torch.isfinite(torch.tensor([values["loss"], values["grad_norm"]])).all()
    assert any(not torch.equal(old, new) for old, new in zip(before, trained, strict=True))
    scaler = session.accelerator.scaler
    if dtype == "fp16":
        assert scaler is not None
        assert scaler.get_scale() > 1.0
    else:
        assert scaler is None


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_a_whole_run(tmp_path, attention):
    run = runner.train(small(tmp_path, f"backend.model.attention={attention}"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert (run / "report.html").is_file()
    assert (run / "final" / "pytorch_lora_weights.safetensors").is_file()
