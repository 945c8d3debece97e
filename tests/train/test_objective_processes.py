"""Every objective: two processes, and micro-batches of another size, train what one process trains.

Each is trained once in this process, once more in small micro-batches, and once in two processes,
all runs in the same two.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import PartialState
from toy.run import (
    ROOT,
    apply_overrides,
    leave_charts_out,
    metrics_of,
    python,
    toy_config,
    weights_of,
)

from mmrl.config import load, parse
from mmrl.resolve import names
from mmrl.runner import train

VARIANTS = {
    "grpo": {},
    "gspo": {"name": "grpo", "importance": "sample", "clip_low": 0.02, "clip_high": 0.03},
    "grpo, dual clip": {"name": "grpo", "dual_clip": 1.1},
    "grpo, two-sided": {"name": "grpo", "delta": 1.5},
    "cispo": {},
    "sapo": {},
    "reinforce": {},
    "sft": {},
    "mhpo": {},
    "gbpo": {"temperature": 1.0},
    "etr": {},
    "r2vpo": {"target": 0.01},
    "mdpo_mirror": {},
    "mdpo_mirror, squared": {"name": "mdpo_mirror", "form": "squared"},
    "p3o_pairwise": {},
    "p3o_pairwise, joint": {"name": "p3o_pairwise", "form": "joint"},
    "real": {},
}
"""The ``objective`` section of each run; without a name that of the run."""
IN_RECIPES = {"grpo_guard": "grpo-guard", "nft": "nft", "opd": "opd-student"}
"""Objectives that need a network; ``test_recipes`` has their recipes in two processes."""
MANY_UPDATES = (
    "training.num_steps=2",
    "training.updates_per_epoch=2",
    "training.num_epochs=2",
    "training.micro_batch_size=1000",
    "evaluation.source=null",
    # Near a plain gradient step: Adam itself would turn the last bits of a sum into a sign.
    "optimizer={learning_rate: 1.0, eps: 10.0, weight_decay: 0}",
)
BY_VARIANT = pytest.mark.parametrize("variant", VARIANTS)


def configuration(variant: str, folder: Path, *overrides: str) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    data = apply_overrides(toy_config(folder), [*MANY_UPDATES, *overrides])
    return {**data, "objective": {"name": variant, **VARIANTS[variant]}}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Run folders, by variant, of this process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    return {v: train(parse(configuration(v, folder / str(i)))) for i, v in enumerate(VARIANTS)}


@pytest.fixture(scope="module")
def shared_out(tmp_path_factory):
    """The same in two processes."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [configuration(v, folder / str(i)) for i, v in enumerate(VARIANTS)]
    (folder / "jobs.yaml").write_text(yaml.safe_dump(jobs))
    done = python(Path(__file__).resolve(), folder / "jobs.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return {v: folder / str(i) / "toy" for i, v in enumerate(VARIANTS)}


def assert_alike(one: Path, other: Path) -> None:
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    left, right = weights_of(one), weights_of(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_no_objective_is_missing():
    known = {section.get("name", variant) for variant, section in VARIANTS.items()}
    assert known | IN_RECIPES.keys() == set(names("objectives"))
    for objective, recipe in IN_RECIPES.items():
        path = ROOT / "configs" / "diffusion" / "tiny-sd3" / f"{recipe}.yaml"
        assert load(path).objective.name == objective


@BY_VARIANT
def test_the_weights_move(variant, alone):
    """Else the tests below would compare nothing; and ratios leave 1."""
    norms = [line["grad_norm"] for line in metrics_of(alone[variant]) if "grad_norm" in line]
    assert min(norms) > 1e-4
    if variant not in ("reinforce", "sft"):
        assert max(line.get("approx_kl", 0.0) for line in metrics_of(alone[variant])) > 1e-6


@BY_VARIANT
def test_two_processes_equal_one(variant, alone, shared_out):
    assert_alike(alone[variant], shared_out[variant])


@BY_VARIANT
def test_micro_batches_do_not_show(variant, alone, tmp_path):
    small = configuration(variant, tmp_path, "training.micro_batch_size=4")
    assert_alike(alone[variant], train(parse(small)))


if __name__ == "__main__":
    PartialState.destroy_process_group = lambda *_, **__: None  # all runs share one group
    leave_charts_out()
    for job in yaml.safe_load(Path(sys.argv[1]).read_text()):
        train(parse(job))
