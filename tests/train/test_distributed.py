"""One, two and three processes: the same trajectory, and totals as the YAML says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from toy.run import metrics_of, toy_config, weights_of

from mmrl.cli import main
from mmrl.distributed import deal, owner, share_cores

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
def test_deal_covers_everything_once_and_keeps_step(count, world):
    shares = [deal(count, rank, world) for rank in range(world)]
    real = sorted(s.index for share in shares for s in share if not s.padding)
    assert real == list(range(count))
    assert len({len(share) for share in shares}) == 1
    sizes = [sum(not s.padding for s in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    for rank, share in enumerate(shares):
        assert all(owner(s.index, world) == rank for s in share if not s.padding)


def launch(folder: Path, launcher: list[str], *overrides: str) -> Path:
    """A toy run under a launcher; its folder.

    The command is this file, which tells afterwards what threads are left.
    """
    folder.mkdir()
    (folder / "toy.yaml").write_text(yaml.safe_dump(toy_config(folder)))
    command = [*launcher, __file__, "train", str(folder / "toy.yaml"), *overrides]
    paths = f"{HERE}{os.pathsep}{ROOT}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if sys.platform == "linux":
        assert "thread left: python" in done.stdout
        # It could still hold a tensor of the last collective and abort the process at its end.
        assert "thread left: pt_gloo" not in done.stdout
    return folder / "toy"


def torchrun(processes: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]


def assert_same_trajectory(first: Path, second: Path) -> None:
    """Equal up to the order of float32 sums."""
    left, right = weights_of(first), weights_of(second)
    assert left.keys() == right.keys()
    for name, value in left.items():
        # 60 terms of order 1, summed in another order, through 6 Adam steps of 0.05.
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(metrics_of(first), metrics_of(second), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6), name


OPTIONS = ("training.updates_per_epoch=2", "training.num_epochs=2", "modulators=[drop_zero]")


def test_two_processes_by_accelerate_launch_equal_one(tmp_path, toy):
    """Through the shipped file, which must really start two."""
    (tmp_path / "one").mkdir()
    one = toy(*OPTIONS, folder=tmp_path / "one")
    config = ROOT / "configs" / "accelerate" / "cpu2.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    two = launch(tmp_path / "two", launcher, *OPTIONS)
    assert yaml.safe_load((two / "environment.json").read_text())["processes"] == 2
    assert_same_trajectory(one, two)


@pytest.mark.slow
def test_three_processes_on_four_groups_equal_one(tmp_path, toy):
    (tmp_path / "one").mkdir()
    one = toy(*OPTIONS, folder=tmp_path / "one")
    three = launch(tmp_path / "three", torchrun(3), *OPTIONS)
    assert yaml.safe_load((three / "environment.json").read_text())["processes"] == 3
    assert_same_trajectory(one, three)
    assert [m["num_samples"] for m in metrics_of(three) if "num_samples" in m] == [20.0] * 6


@pytest.mark.slow
def test_divergence_in_the_reward_is_that_of_all_processes(tmp_path, toy):
    """One group more than processes, so that one of them scores a sample for nothing."""
    (tmp_path / "one").mkdir()
    overrides = (*OPTIONS, "kl_in_reward.coef=0.5", "training.prompts_per_step=3")
    one = toy(*overrides, folder=tmp_path / "one")
    assert max(abs(m.get("kl_in_reward", 0.0)) for m in metrics_of(one)) > 0.01
    assert_same_trajectory(one, launch(tmp_path / "two", torchrun(2), *overrides))


@pytest.mark.slow
def test_a_process_without_any_group_works_for_nothing(tmp_path, toy):
    (tmp_path / "one").mkdir()
    overrides = ("training.prompts_per_step=1", "evaluation.max_prompts=1")
    one = toy(*overrides, folder=tmp_path / "one")
    assert_same_trajectory(one, launch(tmp_path / "two", torchrun(2), *overrides))


def test_an_error_on_one_process_ends_all(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(AssertionError, match="returned 3 values for 2 samples"):
        launch(folder, torchrun(2), "rewards.0.name=toy.rewards.one_too_many")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 6),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 3),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "4"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"MMRL_NUM_THREADS": "2", "LOCAL_WORLD_SIZE": "1"}, 2),
    ],
)
def test_launched_processes_share_the_cores(monkeypatch, environment, expected):
    monkeypatch.setattr("mmrl.distributed.available_cores", lambda: 6)
    share_cores(environment)
    assert torch.get_num_threads() == expected


if __name__ == "__main__":
    try:
        main()
    finally:
        for comm in Path("/proc/self/task").glob("*/comm"):
            print(f"thread left: {comm.read_text().strip()}")
