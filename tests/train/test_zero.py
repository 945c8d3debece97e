"""Two processes under DeepSpeed's ZeRO 2, by its launcher file, end where one process ends."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from test_sharded import averages
from test_tiny_sd3_runs import small_config
from toy.run import column, metrics_of, toy_config, weights_of

from mmrl.checkpoint import found
from mmrl.config import apply_overrides, parse
from mmrl.distributed import configure_zero
from mmrl.errors import UserError
from mmrl.runner import train

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMON = (
    "backend.likelihood.behaviour=ema",
    "rewards=[{name: jpeg_compressibility}]",
    "evaluation.rewards=[{name: jpeg_compressibility}]",
    "evaluation.every=2",
    "evaluation.max_prompts=1",
    "backend.rollout.num_steps=2",
    "training.group_size=2",
    "training.num_steps=2",
    "training.prompts_per_step=2",
    "training.micro_batch_size=1",  # two backwards before each step
    "optimizer.learning_rate=1e-4",
    "optimizer.schedule=linear",
)
RUNS = {
    # Trained float32 next to frozen bfloat16, under autocast.
    "adapter": ("backend.model.dtype=bf16", "optimizer.max_grad_norm=1e-3"),
    "whole": ("backend.model.lora=null",),
}
RESUMED = ("adapter", "toy")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def main(folder: Path) -> None:
    """Train each configuration of ``folder``; some lose their last checkpoint and resume.

    At the end the adapter again, by the same processes without DeepSpeed.
    """
    # It would compile; torch's own collectives will do.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    PartialState.destroy_process_group = lambda *_, **__: None  # all runs share one group
    for path in sorted(folder.glob("*/config.yaml")):
        config = parse(yaml.safe_load(path.read_text()))
        AcceleratorState._reset_state()
        run = train(config)
        if PartialState().is_main_process:
            shutil.copytree(run, path.parent / "unbroken")
            if path.parent.name in RESUMED:
                shutil.rmtree(found(run)[-1])
        PartialState().wait_for_everyone()
        if path.parent.name in RESUMED:
            AcceleratorState._reset_state()
            train(config, resume=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    AcceleratorState._reset_state(reset_partial_state=True)
    config = yaml.safe_load((folder / "adapter" / "config.yaml").read_text())
    train(parse({**config, "output_dir": str(folder / "adapter" / "plain")}))


def configurations(folder: Path) -> dict[str, dict]:
    """Those of ``RUNS``, and a toy whose third update has gradients that are not finite."""
    toy = {**toy_config(folder / "toy"), "name": "run"}
    return {
        **{name: small_config(folder / name, *COMMON, *more) for name, more in RUNS.items()},
        "toy": apply_overrides(toy, ["backend.poison_step=2", "optimizer.max_grad_norm=0.1"]),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with, for each configuration: ``one`` process, and two (``unbroken``).

    For the adapter ``plain``, two processes without DeepSpeed, in place of ``one``.
    """
    folder = tmp_path_factory.mktemp("zero")
    for name in (*RUNS, "toy"):
        (folder / name).mkdir()
    configs = configurations(folder)
    for name, config in configs.items():
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    launcher = ["-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    launcher += ["--config_file", str(ROOT / "configs" / "accelerate" / "zero2.yaml")]
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("whole", "toy"):
        config = configs[name]
        AcceleratorState._reset_state()
        train(parse({**config, "output_dir": str(folder / name / "one"), "name": "one"}))
    return folder


@needs_deepspeed
def test_full_training_equals_one_process(runs):
    """Moments of Adam, references and averages included."""
    one, two = runs / "whole" / "one", runs / "whole" / "unbroken"
    left, right = weights_of(one), weights_of(two)
    assert left.keys() == right.keys()
    for name, value in left.items():
        # Sums in another order; Adam scales what they leave of tiny gradients up to its rate.
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=2e-5, msg=name)
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


@needs_deepspeed
def test_an_adapter_equals_two_processes_without_deepspeed(runs):
    """One process would batch its rollouts differently, which bfloat16 shows."""
    plain, zero = runs / "adapter" / "plain", runs / "adapter" / "unbroken"
    for a, b in zip(metrics_of(plain), metrics_of(zero), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    left, right = weights_of(plain), weights_of(zero)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-7, msg=name)


@needs_deepspeed
def test_clipped_and_skipped_updates_equal_those_of_one_process(runs):
    one, two = runs / "toy" / "one", runs / "toy" / "unbroken"
    assert column(two, "bad_updates") == [0, 0, 1, 1, 1, 1]
    assert min(column(two, "grad_norm")) > 0.1  # all were clipped
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        known = {key: value for key, value in a.items() if value is not None}
        assert a.keys() - known.keys() == {key for key, value in b.items() if value is None}
        assert {key: b[key] for key in known} == pytest.approx(known, rel=1e-5)
    left, right = weights_of(one), weights_of(two)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-7, msg=name)


@needs_deepspeed
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_to_the_bit(runs, name):
    before, after = runs / name / "unbroken", runs / name / "run"
    left, right = weights_of(before), weights_of(after)
    assert left.keys() == right.keys()
    assert [key for key in left if not torch.equal(left[key], right[key])] == []
    assert metrics_of(before) == metrics_of(after)


@needs_deepspeed
def test_a_run_resumes_without_deepspeed(runs, tmp_path):
    config = yaml.safe_load((runs / "toy" / "config.yaml").read_text())
    shutil.copytree(runs / "toy" / "unbroken", tmp_path / "run")
    shutil.rmtree(found(tmp_path / "run")[-1])
    train(parse({**config, "output_dir": str(tmp_path / "run")}), resume=True)
    left, right = weights_of(runs / "toy" / "unbroken"), weights_of(tmp_path / "run")
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-5, atol=1e-7, msg=name)


@needs_deepspeed
def test_the_exported_network_is_the_average_and_loads_in_diffusers(runs):
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    run = runs / "whole" / "unbroken"
    network = SD3Transformer2DModel.from_pretrained(run / "final" / "transformer")
    expected, exported = averages(run), dict(network.named_parameters())
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)


@needs_deepspeed
def test_the_exported_adapter_loads_in_diffusers(runs):
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )

    run = runs / "adapter" / "unbroken"
    state: Any = StableDiffusion3Pipeline.lora_state_dict(run / "final")
    values = list(averages(run).values())
    assert len(state) == len(values)
    assert all(any(torch.equal(x, y) for y in values) for x in state.values())


@pytest.mark.parametrize(
    ("stage", "offload", "precision", "message"),
    [
        (3, "none", "no", "zero_stage 3"),
        (2, "cpu", "no", "offload_optimizer_device cpu"),
        (2, "none", "fp16", r"model\.dtype: fp16"),
    ],
)
def test_untested_kinds_of_deepspeed_are_refused(stage, offload, precision, message):
    zero = {"stage": stage, "offload_optimizer": {"device": offload}}
    with pytest.raises(UserError, match=message):
        configure_zero({"zero_optimization": zero}, precision)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trained_weights_stay_float32(precision):
    config: dict = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
    configure_zero(config, precision)
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert config["torch_autocast"]["enabled"] == (precision == "bf16")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
