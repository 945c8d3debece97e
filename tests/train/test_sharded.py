"""Two processes that share the weights (FSDP2) end where one process ends.

accelerate shards on accelerators only: on the CPU it ignores the plugin.  The processes below hand
it the plugin afterwards, and from there on everything is what ``accelerate launch`` would run.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from safetensors.torch import load_file
from toy.run import ROOT, SMALLER, metrics_of, python, small_config, weights_of

from mmrl.config import apply_overrides, parse, read_yaml
from mmrl.distributed import one_group_of_processes
from mmrl.runner import train

RUNS = {
    # Trained float32 next to frozen bfloat16 in one sharded block.
    "adapter": ("backend.model.dtype=bf16", "optimizer.learning_rate=1e-4"),
    # Groups of 3 and 1: one process would draw two batches more than the other.
    "whole": (
        "backend.model.lora=null",
        "optimizer.learning_rate=1e-4",
        "prompts.budget.name=toy.budgets",
        "backend.rollout.batch_size=1",
    ),
}
RESUMED = "adapter"
LANGUAGE = {
    "text": (ROOT / "configs/text/tiny-qwen/grpo-arithmetic.yaml", "tiny-qwen"),
    "vlm": (ROOT / "configs/vlm/tiny-qwen-vl/g2rpo-vas.yaml", "tiny-qwen-vl"),
}
SMALL_LANGUAGE = (
    "training.num_steps=2",
    "training.prompts_per_step=3",
    "training.group_size=4",
    "training.micro_batch_size=5",
    "optimizer={learning_rate: 1e-4}",
    "evaluation.max_prompts=1",
    "evaluation.samples_per_prompt=1",
    "checkpoint.every=1",
    "tracking.trackers=[]",
)


def configurations(folder: Path) -> dict[str, dict]:
    """By name, with all paths absolute."""
    found = {name: small_config(folder / name, *SMALLER, *more) for name, more in RUNS.items()}
    for name, (recipe, model) in LANGUAGE.items():
        data = read_yaml(recipe)
        absolute = (
            f"output_dir={folder / name / 'run'}",
            f"backend.model.path={ROOT / 'assets' / model}",
            *(f"{part}.source={ROOT / data[part]['source']}" for part in ("prompts", "evaluation")),
        )
        found[name] = apply_overrides(data, [*absolute, *SMALL_LANGUAGE])
    return found


def sharding_accelerator(*args, **options):
    """What ``make_accelerator`` returns under ``fsdp2.yaml``, on CPU processes."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    from mmrl.distributed import keep_own_dtypes, make_accelerator

    accelerator = make_accelerator(*args, **options)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    # As a launch in bf16 would leave it, which rounds inputs and outputs, and undone again.
    accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    keep_own_dtypes(accelerator)
    return accelerator


def main(folder: Path, names: list[str]) -> None:
    """Train the named configurations of ``folder``; one loses its last checkpoint and resumes."""
    import mmrl.runner

    mmrl.runner.make_accelerator = sharding_accelerator
    for name in names:
        config = parse(yaml.safe_load((folder / name / "config.yaml").read_text()))
        AcceleratorState._reset_state()
        run = train(config)
        if PartialState().is_main_process:
            shutil.copytree(run, folder / name / "unbroken")
            if name == RESUMED:
                shutil.rmtree(run / "checkpoint-2")
        PartialState().wait_for_everyone()
        if name == RESUMED:
            AcceleratorState._reset_state()
            train(config, resume=True)


def trained(folder: Path, names: Iterable[str]) -> Path:
    """The folder with, for each name: ``one`` process, and two (``unbroken``)."""
    configs = {name: found for name, found in configurations(folder).items() if name in names}
    for name, config in configs.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.yaml").write_text(yaml.safe_dump(config))
    done = python(Path(__file__).resolve(), folder, *names, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name, config in configs.items():
        AcceleratorState._reset_state()
        train(parse({**config, "output_dir": str(folder / name / "one")}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("sharded"), RUNS)


@pytest.fixture(scope="module", params=["text", pytest.param("vlm", marks=pytest.mark.slow)])
def language(request, tmp_path_factory):
    """The folder of one configuration of ``LANGUAGE``, and its name."""
    name = request.param
    return trained(tmp_path_factory.mktemp(name), [name]) / name, name


def test_sharded_full_training_equals_one_process(runs):
    """References and averages included: they are the copies that sharding could leave stale."""
    one, two = runs / "whole" / "one", runs / "whole" / "unbroken"
    left, right = weights_of(one), weights_of(two)
    assert left.keys() == right.keys()
    for name, value in left.items():
        # Sums in another order; Adam scales what they leave of tiny gradients up to its rate, 1e-4,
        # so single numbers may be half an update apart, but never many of them.
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=5e-5, msg=name)
        assert (right[name] - value).abs().mean() < 1e-5, name
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        # The second step's pictures come from weights that differ: a pixel that is rounded the
        # other way changes the bytes of a JPEG, whose spread here is about one byte.
        rel = 1e-3 if a["step"] < 2 else 5e-2
        assert a == pytest.approx(b, rel=rel, abs=1e-5)


def test_sharded_language_training_equals_one_process(language):
    import transformers

    folder, name = language
    one, two = folder / "one", folder / "unbroken"
    left, right = weights_of(one), weights_of(two)
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-4, atol=5e-5, msg=key)
        assert (right[key] - value).abs().mean() < 1e-5, key
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        absent = [{key for key, value in row.items() if value is None} for row in (a, b)]
        assert absent[0] == absent[1], "rewards that no prompt of a step asked for"
        a, b = ({k: v for k, v in row.items() if v is not None} for row in (a, b))
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    kind = {"text": "Qwen3ForCausalLM", "vlm": "Qwen3VLForConditionalGeneration"}[name]
    network = getattr(transformers, kind).from_pretrained(two / "final")
    expected = load_file(two / "checkpoint-2" / "weights.safetensors")
    found = dict(network.named_parameters())
    assert expected
    for key, value in expected.items():
        assert torch.equal(found[key.removeprefix("network.")], value), key


def test_sharded_adapter_follows_one_process(runs):
    """As far as bfloat16 activations in batches of other sizes agree."""
    one, two = (metrics_of(runs / "adapter" / name) for name in ("one", "unbroken"))
    for a, b in zip(one, two, strict=True):
        for name in ("velocity_norm", "velocity_norm_ratio", "reward"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=0.05), name
    shapes = [
        {k: (v.shape, v.dtype) for k, v in weights_of(runs / "adapter" / name).items()}
        for name in ("one", "unbroken")
    ]
    assert shapes[0] == shapes[1]


def test_a_sharded_run_resumes_to_the_bit(runs):
    before, after = runs / RESUMED / "unbroken", runs / RESUMED / "run"
    left, right = weights_of(before), weights_of(after)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert metrics_of(before) == metrics_of(after)


def averages(run: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of the last checkpoint, by parameter name."""
    state = load_file(run / "checkpoint-2" / "auxiliary.safetensors")
    return {k.removeprefix("average:"): v for k, v in state.items() if k.startswith("average:")}


def test_the_exported_network_is_the_average_and_loads_in_diffusers(runs):
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    run = runs / "whole" / "unbroken"
    folder = run / "final" / "transformer"
    network = SD3Transformer2DModel.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["_class_name"] == type(network).__name__
    expected, found = averages(run), dict(network.named_parameters())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_exported_adapter_is_the_average_and_loads_in_diffusers(runs):
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import (
        StableDiffusion3Pipeline,
    )

    run = runs / "adapter" / "unbroken"
    pipeline = StableDiffusion3Pipeline.from_pretrained(ROOT / "assets" / "tiny-sd3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(run / "final")
    found = {
        name.replace(".default_0.", ".default."): value
        for name, value in pipeline.transformer.named_parameters()
        if "lora_" in name
    }
    expected = averages(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with one_group_of_processes():
        main(Path(sys.argv[1]), sys.argv[2:])
