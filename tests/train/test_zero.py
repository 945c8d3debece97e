"""Two processes under DeepSpeed's ZeRO, by its launcher files, end where one process ends."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from test_sharded import averages
from test_text_runs import config as text_config
from test_text_runs import save_model
from test_tiny_sd3_runs import small_config
from toy.run import column, metrics_of, toy_config, weights_of

from mmrl.checkpoint import found
from mmrl.config import apply_overrides, parse
from mmrl.distributed import one_group_of_processes
from mmrl.errors import UserError
from mmrl.runner import train
from mmrl.zero import refuse_unless_allowed, settings

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
MODELS = {
    # Trained float32 next to frozen bfloat16, under autocast.
    "adapter": ("backend.model.dtype=bf16", "optimizer.max_grad_norm=1e-3"),
    "whole": ("backend.model.lora=null",),
}
OPTIMIZER = {"OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
LAUNCHED: dict[str, dict[str, dict[str, str]]] = {
    "zero2": {
        "adapter": {},
        "whole": {},
        "toy": {},
        "toy-stage1": {"ZERO_STAGE": "1"},
        "toy-offloaded": OPTIMIZER,
    },
    "zero3": {
        "adapter": {},
        "whole": {},
        # What `accelerate config` proposes.
        "toy": {"ZERO3_INIT": "true"},
        "whole-offloaded": {**OPTIMIZER, "OFFLOAD_PARAM_DEVICE": "cpu"},
        # Processes with completions of other lengths must make as many forwards.
        "text": {},
        "toy-offloaded": {**OPTIMIZER, "OFFLOAD_PARAM_DEVICE": "cpu"},
    },
}
"""Launcher files, what is trained under them, and what is changed of the file for it."""
RUNS = [(launcher, name) for launcher, runs in LAUNCHED.items() for name in runs]
STAGES = ("zero2", "zero3")
BROKEN = ("adapter", "toy", "toy-stage1", "toy-offloaded")
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)


def kind(name: str) -> str:
    """``whole-offloaded`` -> ``whole``: what is trained."""
    return name.partition("-")[0]


def main(folder: Path) -> None:
    """Train each configuration of ``folder``; most lose their last checkpoint and resume."""
    # It would compile; torch's own collectives will do.
    vars(importlib.import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    for path in sorted(folder.glob("*/config.yaml")):
        config = parse(yaml.safe_load(path.read_text()))
        with launched_with(json.loads((path.parent / "launch.json").read_text())):
            run = train(config)
            if PartialState().is_main_process:
                shutil.copytree(run, path.parent / "unbroken")
                if path.parent.name in BROKEN:
                    shutil.rmtree(found(run)[-1])
            PartialState().wait_for_everyone()
            if path.parent.name in BROKEN:
                AcceleratorState._reset_state()
                train(config, resume=True)


@contextlib.contextmanager
def launched_with(changes: dict[str, str]) -> Iterator[None]:
    """As if the launcher file had said so: nothing but the environment carries what it says."""
    before = dict(os.environ)
    os.environ.update({f"ACCELERATE_DEEPSPEED_{key}": value for key, value in changes.items()})
    AcceleratorState._reset_state()
    yield
    os.environ.clear()
    os.environ.update(before)


def plain(folder: Path) -> None:
    """Train the adapter by the same processes without DeepSpeed."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
    AcceleratorState._reset_state(reset_partial_state=True)
    train(parse(yaml.safe_load((folder / "config.yaml").read_text())))


def configuration(folder: Path, name: str) -> dict:
    """One of ``MODELS``, or a toy whose third update has gradients that are not finite."""
    folder.mkdir(parents=True)
    if kind(name) == "text":
        model = save_model(folder / "model", "qwen3")
        small = ("training.num_steps=2", "optimizer.learning_rate=1e-4")
        return text_config(model, folder, "backend.model.lora=null", *small)
    if kind(name) in MODELS:
        prompts = folder / "prompts.jsonl"  # few, as all are encoded
        lines = (ROOT / "assets" / "prompts" / "ocr-train.jsonl").read_text().splitlines()
        prompts.write_text("\n".join(lines[:4]) + "\n")
        source = f"prompts.source={prompts}"
        return small_config(folder, *COMMON, *MODELS[kind(name)], source)
    toy = {**toy_config(folder), "name": "run"}
    return apply_overrides(toy, ["backend.poison_step=2", "optimizer.max_grad_norm=0.1"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with ``<launcher>/<name>/unbroken`` for all of ``LAUNCHED``.

    And what they should equal: ``one/<kind>/run`` of one process, but for the adapter
    ``plain/adapter/run`` of two without DeepSpeed.
    """
    torch.set_num_threads(1)  # like each of the two processes: sums in the same order
    folder = tmp_path_factory.mktemp("zero")
    for launcher, names in {**LAUNCHED, "plain": {"adapter": {}}}.items():
        for name, changes in names.items():
            config = configuration(folder / launcher / name, name)
            (folder / launcher / name / "config.yaml").write_text(yaml.safe_dump(config))
            (folder / launcher / name / "launch.json").write_text(json.dumps(changes))
    for launcher in LAUNCHED:
        launch(launcher, folder)
    for name in ("whole", "toy", "text"):
        AcceleratorState._reset_state()
        train(parse(configuration(folder / "one" / name, name)))
    return folder


def launch(launcher: str, folder: Path) -> None:
    """This file in two processes, by a launcher file."""
    command = ["-m", "accelerate.commands.launch", "--num_processes=2", "--main_process_port=0"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / f"{launcher}.yaml")]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
    }
    done = subprocess.run(
        [sys.executable, *command, str(Path(__file__).resolve()), str(folder), launcher],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def assert_equal(one: Path, two: Path, *, rtol: float, atol: float) -> None:
    """Weights, averages, references and moments of Adam."""
    left, right = weights_of(one), weights_of(two)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=rtol, atol=atol, msg=name)


@needs_deepspeed
@pytest.mark.parametrize(("launcher", "name"), [x for x in RUNS if kind(x[1]) == "whole"])
def test_full_training_equals_one_process(runs, launcher, name):
    one, two = runs / "one" / "whole" / "run", runs / launcher / name / "unbroken"
    # Sums in another order; Adam scales what they leave of tiny gradients up to its rate, 1e-4, so
    # single numbers may be an update apart, but never many of them.
    assert_equal(one, two, rtol=1e-4, atol=1e-4)
    left, right = weights_of(one), weights_of(two)
    assert max((right[name] - value).abs().mean() for name, value in left.items()) < 1e-5
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        # As in test_sharded: a pixel of the second step's pictures may be rounded the other way.
        assert a == pytest.approx(b, rel=1e-3 if a["step"] < 2 else 5e-2, abs=1e-6)


@needs_deepspeed
def test_a_text_model_samples_and_trains_as_one_process_does(runs):
    one, two = runs / "one" / "text" / "run", runs / "zero3" / "text" / "unbroken"
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    assert_equal(one, two, rtol=1e-4, atol=2e-5)  # as of a whole image model


@needs_deepspeed
def test_an_adapter_equals_two_processes_without_deepspeed(runs):
    """One process would batch its rollouts differently, which bfloat16 shows."""
    one, two = runs / "plain" / "adapter" / "run", runs / "zero2" / "adapter" / "unbroken"
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert_equal(one, two, rtol=1e-5, atol=1e-7)


@needs_deepspeed
def test_a_split_adapter_starts_as_two_processes_without_deepspeed(runs):
    """ZeRO 3 adds bfloat16 gradients of activations in another order, so the updates differ."""
    one, two = runs / "plain" / "adapter" / "run", runs / "zero3" / "adapter" / "unbroken"
    for a, b in zip(metrics_of(one)[:2], metrics_of(two)[:2], strict=True):
        norms = [x.pop("grad_norm", 0.0) for x in (a, b)]
        assert b == pytest.approx(a, rel=1e-5)
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)


@needs_deepspeed
@pytest.mark.parametrize(("launcher", "name"), [x for x in RUNS if kind(x[1]) == "toy"])
def test_clipped_and_skipped_updates_equal_those_of_one_process(runs, launcher, name):
    one, two = runs / "one" / "toy" / "run", runs / launcher / name / "unbroken"
    assert column(two, "bad_updates") == [0, 0, 1, 1, 1, 1]
    assert min(column(two, "grad_norm")) > 0.1  # all were clipped
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        known = {key: value for key, value in a.items() if value is not None}
        assert a.keys() - known.keys() == {key for key, value in b.items() if value is None}
        # Absolute: advantages cancel in the loss.
        assert {key: b[key] for key in known} == pytest.approx(known, rel=1e-5, abs=1e-7)
    assert_equal(one, two, rtol=1e-5, atol=1e-7)


@needs_deepspeed
@pytest.mark.parametrize(("launcher", "name"), [x for x in RUNS if x[1] in BROKEN])
def test_a_run_resumes_to_the_bit(runs, launcher, name):
    before, after = runs / launcher / name / "unbroken", runs / launcher / name / "run"
    assert_equal(before, after, rtol=0, atol=0)
    assert metrics_of(before) == metrics_of(after)


@needs_deepspeed
@pytest.mark.parametrize("launcher", STAGES)
def test_a_run_resumes_without_deepspeed(runs, launcher, tmp_path):
    source = runs / launcher / "toy"
    config = yaml.safe_load((source / "config.yaml").read_text())
    shutil.copytree(source / "unbroken", tmp_path / "run")
    shutil.rmtree(found(tmp_path / "run")[-1])
    AcceleratorState._reset_state()
    train(parse({**config, "output_dir": str(tmp_path / "run")}), resume=True)
    assert_equal(source / "unbroken", tmp_path / "run", rtol=1e-5, atol=1e-7)


@needs_deepspeed
@pytest.mark.parametrize(("launcher", "name"), [x for x in RUNS if kind(x[1]) == "whole"])
def test_the_exported_network_is_the_average_and_loads_in_diffusers(runs, launcher, name):
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    run = runs / launcher / name / "unbroken"
    network = SD3Transformer2DModel.from_pretrained(run / "final" / "transformer")
    expected, exported = averages(run), dict(network.named_parameters())
    assert expected.keys() == exported.keys()
    assert all(torch.equal(expected[name], exported[name]) for name in expected)


@needs_deepspeed
@pytest.mark.parametrize("launcher", STAGES)
def test_the_exported_adapter_loads_in_diffusers(runs, launcher):
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )

    run = runs / launcher / "adapter" / "unbroken"
    state: Any = StableDiffusion3Pipeline.lora_state_dict(run / "final")
    values = list(averages(run).values())
    assert len(state) == len(values)
    assert all(any(torch.equal(x, y) for y in values) for x in state.values())


@pytest.mark.parametrize(
    ("section", "precision", "message"),
    [
        ({"stage": 0}, "no", r"stage = 0"),
        ({}, "no", r"stage = 0"),
        (
            {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            "no",
            r"optimizer\.device = 'nvme'",
        ),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "no",
            r"offload_param\.device = 'nvme'",
        ),
        ({"stage": 3, "zero_hpz_partition_size": 2}, "no", "zero_hpz_partition_size = 2"),
        ({"stage": 3, "zero_quantized_weights": True}, "no", "zero_quantized_weights = True"),
        ({"stage": 2, "offload_param": None}, "fp16", r"model\.dtype: fp16"),
    ],
)
def test_other_kinds_of_deepspeed_are_refused(section, precision, message):
    with pytest.raises(UserError, match=message):
        refuse_unless_allowed(section, precision)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trained_weights_stay_float32(precision):
    config = settings(precision)
    assert config["bf16"] == config["fp16"] == {"enabled": False}
    assert config["torch_autocast"]["enabled"] == (precision == "bf16")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with one_group_of_processes():
        main(Path(sys.argv[1]) / sys.argv[2])
        if sys.argv[2] == STAGES[0]:
            plain(Path(sys.argv[1]) / "plain" / "adapter")
