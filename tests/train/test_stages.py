"""Several runs in one command: the results of one by one, nothing lost and nothing done twice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from toy.run import launch, metrics_of, toy_config, weights_of
from typer.testing import CliRunner

import mmrl.runner
from mmrl import stages
from mmrl.checkpoint import found
from mmrl.cli import app
from mmrl.config import apply_overrides, parse
from mmrl.errors import UserError

STEPS, SAMPLES = 4, 4 * 20


def pair(folder: Path, **second) -> dict:
    """A stages file, and the files it names: the second toy starts where the first one ended.

    The first is in another precision, of which accelerate keeps one for a whole process.
    """
    toy = apply_overrides(
        toy_config(folder), ["backend.name=toy.cascade", f"training.num_steps={STEPS}"]
    )
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts" / "toy.yaml").write_text(yaml.safe_dump(toy))
    start = {"backend.start": "{first}", "optimizer.learning_rate": 0.02}
    return {
        "name": "pair",
        "output_dir": str(folder / "{name}"),
        "stages": [
            {"name": "first", "config": "parts/toy.yaml", "set": {"backend.precision": "bf16"}},
            {"name": "second", "config": "parts/toy.yaml", "set": {**start, **second}},
        ],
    }


def run_cli(folder: Path, plan: dict, *words: str, command: str = "train"):
    """A command on a stages file, in this process."""
    (folder / "pair.yaml").write_text(yaml.safe_dump(plan))
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [command, str(folder / "pair.yaml"), *words]
    )


def record(folder: Path) -> dict:
    """What ``stages.json`` says of each stage, by name."""
    found = json.loads((folder / "pair" / stages.RECORD).read_text())
    return {entry["name"]: entry for entry in [*found["stages"], found["total"]]}


def assert_same_run(first: Path, second: Path) -> None:
    assert metrics_of(first) == metrics_of(second)
    left, right = weights_of(first), weights_of(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished pair, and what the command printed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_cli(folder, pair(folder))
    assert done.exit_code == 0, done.output
    return folder, done.output


@pytest.fixture
def whole(finished):
    """The folder of a finished pair, to look at only."""
    return finished[0]


# ---------------------------------------------------------------- results


def test_stages_equal_runs_one_by_one(whole, tmp_path):
    for name in ("first", "second"):
        written = yaml.safe_load((whole / "pair" / name / "config.yaml").read_text())
        assert written["name"] == f"pair-{name}"
        alone = mmrl.runner.train(parse({**written, "output_dir": str(tmp_path / name)}))
        stages._forget_accelerator()
        assert_same_run(whole / "pair" / name, alone)


def test_a_stage_starts_where_the_one_before_ended(whole):
    first, second = (metrics_of(whole / "pair" / name) for name in ("first", "second"))
    assert second[0]["eval/near"] == first[-1]["eval/near"] > first[0]["eval/near"]
    assert second[-1]["eval/near"] > second[0]["eval/near"]


def test_costs_are_added_up(whole):
    found = record(whole)
    parts = [found["first"], found["second"]]
    for key, least in (("steps", STEPS), ("wall_seconds", 0.01), ("cpu_seconds", 0.01)):
        assert all(part[key] >= least for part in parts)
        assert found["all stages"][key] == pytest.approx(sum(part[key] for part in parts), abs=2e-3)
    last = metrics_of(whole / "pair" / "second")
    near = {"before": last[0]["eval/near"], "after": last[-1]["eval/near"]}
    assert found["second"]["held_out"]["near"] == near
    assert all(part["finished"] for part in found.values())


def test_the_table_and_the_page(finished):
    folder, output = finished
    lines = [line.split() for line in output.splitlines()]
    rows = {words[0]: words[1:] for words in lines if words[:1] in (["first"], ["second"])}
    assert rows["first"][0] == rows["second"][0] == str(STEPS)
    assert rows["first"][3] == "near"
    assert rows["first"][5] == rows["second"][4], "one ends where the other starts"
    assert ["all", "stages", str(2 * STEPS)] in [words[:3] for words in lines]
    assert str(folder / "pair" / stages.REPORT) in output
    page = (folder / "pair" / stages.REPORT).read_text()
    assert 'href="first/report.html"' in page
    assert "CPU seconds" in page


# ---------------------------------------------------------------- interruptions


def test_killed_in_the_second_stage_and_resumed(whole, tmp_path):
    plan = pair(tmp_path, **{"rewards.0.name": "toy.rewards.kills_itself"})
    path = tmp_path / "pair.yaml"
    extra = {"TOY_KILL_MARKER": str(tmp_path / "killed"), "TOY_KILL_CALL": "17"}
    assert launch(plan, path, **extra).returncode == -signal.SIGKILL
    first, second = tmp_path / "pair" / "first", tmp_path / "pair" / "second"
    assert [p.name for p in found(second)] == ["checkpoint-2"]
    assert record(tmp_path)["first"]["finished"]
    trained = {file: os.stat(file).st_mtime_ns for file in first.rglob("*")}
    resumed = run_cli(tmp_path, plan, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "first (finished)" in resumed.output
    assert {file: os.stat(file).st_mtime_ns for file in first.rglob("*")} == trained
    for name in ("first", "second"):
        assert_same_run(whole / "pair" / name, tmp_path / "pair" / name)


def test_an_interruption_keeps_its_costs_and_is_continued(monkeypatch, whole, tmp_path):
    train = mmrl.runner.train

    def stops_half_way(config, *, resume):
        if config.name == "pair-second":
            half = apply_overrides(config.dump(), ["training.num_steps=2"])
            train(parse(half), resume=resume)
            raise KeyboardInterrupt("saved step 2; continue with --resume")
        return train(config, resume=resume)

    with monkeypatch.context() as patch:
        patch.setattr(mmrl.runner, "train", stops_half_way)
        stopped = run_cli(tmp_path, pair(tmp_path))
    assert (stopped.exit_code, "saved step 2" in stopped.output) == (130, True)
    before = record(tmp_path)
    assert (before["first"]["finished"], before["second"]["finished"]) == (True, False)
    assert before["second"]["cpu_seconds"] > 0
    stages._forget_accelerator()
    resumed = run_cli(tmp_path, pair(tmp_path), "--resume")
    assert resumed.exit_code == 0, resumed.output
    after = record(tmp_path)
    assert after["first"] == before["first"]
    assert after["second"]["finished"]
    for key in ("wall_seconds", "cpu_seconds"):
        assert after["second"][key] > before["second"][key]
    left, right = (weights_of(folder / "pair" / "second") for folder in (whole, tmp_path))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_costs_of_continuations_are_added():
    first = stages.Spent(wall=2.0, cpu=3.0)
    assert first + stages.Spent(wall=1.0, cpu=0.5, finished=True) == stages.Spent(
        wall=3.0, cpu=3.5, finished=True
    )


def test_resuming_a_finished_plan_trains_nothing(monkeypatch, whole):
    before = record(whole)
    monkeypatch.setattr(mmrl.runner, "train", lambda *a, **k: pytest.fail("trained again"))
    again = run_cli(whole, pair(whole), "--resume")
    assert again.exit_code == 0, again.output
    assert record(whole) == before


def test_only_the_last_stage_can_train_on(tmp_path):
    plan = pair(tmp_path)
    assert run_cli(tmp_path, plan, "training.num_steps=1").exit_code == 0
    refused = run_cli(tmp_path, plan, "--resume", "training.num_steps=2")
    assert refused.exit_code == 2
    assert "began from first, which would train on" in " ".join(refused.output.split())
    longer = ("first.training.num_steps=1", "second.training.num_steps=2")
    done = run_cli(tmp_path, plan, "--resume", *longer)
    assert done.exit_code == 0, done.output
    assert [entry["steps"] for entry in record(tmp_path).values()] == [1, 2, 3]


def test_an_existing_folder_and_a_changed_configuration_are_refused(whole):
    again = run_cli(whole, pair(whole))
    assert again.exit_code == 2
    assert "continue it with --resume" in again.output.replace("\n", " ")
    changed = run_cli(whole, pair(whole), "--resume", "second.seed=5")
    assert changed.exit_code == 2
    assert "stage 'second'" in changed.output
    assert "seed: 0 -> 5" in changed.output


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_equal_one(whole, tmp_path):
    done = launch(pair(tmp_path), tmp_path / "pair.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("stage 2 of 2") == 1, "one process talks"
    for name in ("first", "second"):
        one, two = whole / "pair" / name, tmp_path / "pair" / name
        assert json.loads((two / "environment.json").read_text())["processes"] == 2
        left, right = weights_of(one), weights_of(two)
        for key, value in left.items():
            # 60 terms of order 1, summed in another order, through 4 Adam steps of 0.05.
            torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-6)
    assert record(tmp_path)["all stages"]["finished"]


def test_other_processes_write_nothing(monkeypatch, tmp_path):
    plan = stages.load(written(tmp_path, pair(tmp_path)))
    monkeypatch.setattr(mmrl.runner, "train", lambda *a, **k: None)
    assert stages.train(plan, resume=False, main=False, announce=lambda text: None) == []
    assert not plan.folder.exists()


# ---------------------------------------------------------------- what is written


def written(folder: Path, plan: dict) -> Path:
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder / "plan.yaml"


def test_overrides_of_one_stage_of_all_and_of_the_file(tmp_path):
    path = written(tmp_path, pair(tmp_path, **{"evaluation.max_prompts": 3}))
    overrides = ["seed=7", "second.training.num_steps=9", "name=other", "first.optimizer.eps=1e-6"]
    plan = stages.load(path, [*overrides, "second.prompts.source={first}/more.jsonl"])
    first, second = (stage.config for stage in plan.stages)
    assert plan.folder == tmp_path / "other"
    assert (first.seed, second.seed) == (7, 7)
    assert (first.training.num_steps, second.training.num_steps) == (STEPS, 9)
    assert (first.optimizer.eps, second.optimizer.eps) == (1e-6, 1e-8)
    assert second.evaluation.max_prompts == 3
    assert second.prompts.source == plan.folder / "first" / "more.jsonl"
    assert [stage.needs for stage in plan.stages] == [{}, {"first": plan.folder / "first"}]


def test_references_are_found_inside_lists_and_sections(tmp_path):
    rewards = [{"name": "toy.rewards.near_target", "label": "{first}"}]
    config = stages.load(written(tmp_path, pair(tmp_path, rewards=rewards))).stages[1].config
    assert config.rewards[0].label == str(tmp_path / "pair" / "first")


def test_check_prints_every_stage_and_the_total(tmp_path):
    plan = pair(tmp_path)
    plan["stages"][1]["set"]["training.num_epochs"] = 3
    result = run_cli(tmp_path, plan, command="check")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert f"optimizer steps {STEPS} = {STEPS} steps x 1" in text
    assert "checked later needs what first makes" in text, "there is no mean to start from yet"
    assert f"optimizer steps {STEPS * 4} samples in all {2 * SAMPLES}" in text
    assert not (tmp_path / "pair").exists()


def test_check_after_training_puts_nothing_off(whole):
    result = run_cli(whole, pair(whole), command="check")
    assert result.exit_code == 0, result.output
    assert "checked later" not in result.output
    assert result.output.count("optimizer steps") == 3


MISTAKES = {
    "an unknown stage": (
        lambda plan: plan["stages"][1]["set"].update({"backend.start": "{fisrt}"}),
        ["stages[1].set.backend.start", "{fisrt} names no earlier stage", "did you mean 'first'?"],
    ),
    "a later stage": (
        lambda plan: plan["stages"][0]["set"].update({"backend.start": "{second}"}),
        ["stages[0].set.backend.start", "{second} names no earlier stage; this is the first"],
    ),
    "a missing file": (
        lambda plan: plan["stages"][1].update(config="parts/absent.yaml"),
        ["stages[1].config", "not found", "parts/absent.yaml"],
    ),
    "the same name twice": (
        lambda plan: plan["stages"][1].update(name="first", set={}),
        ["stages: 2 stages are named 'first'"],
    ),
    "no stage": (lambda plan: plan["stages"].clear(), ["stages: ", "at least 1 item"]),
    "a misspelt key": (
        lambda plan: plan.update(output_dri="x"),
        ["unknown key 'output_dri'; did you mean 'output_dir'?"],
    ),
    "a misspelt list of stages": (
        lambda plan: plan.update(stagse=plan.pop("stages")),
        ["unknown key 'stagse'; did you mean 'stages'?"],
    ),
    "a misspelt key of a stage": (
        lambda plan: plan["stages"][0].update(cofnig="x"),
        ["stages[0].cofnig: unknown key", "did you mean 'config'?"],
    ),
    "a misspelt key of a run": (
        lambda plan: plan["stages"][1]["set"].update({"training.num_stepz": 2}),
        ["stage 'second': training.num_stepz", "did you mean 'num_steps'?"],
    ),
    "a stage named like a key": (
        lambda plan: plan["stages"][0].update(name="rewards"),
        ["stages[0].name", "key of every run", "'rewards'"],
    ),
    "a folder of its own": (
        lambda plan: plan["stages"][0]["set"].update(output_dir="x"),
        ["stages[0].set", "'output_dir' follows from the stages file"],
    ),
    "a tracker that is not there": (
        lambda plan: plan["stages"][1]["set"].update({"tracking.trackers": ["mlflow"]}),
        ["stage 'second'", "'mlflow' is not installed"],
    ),
    "a start that no stage makes": (
        lambda plan: plan["stages"][1]["set"].update({"backend.start": "nowhere"}),
        ["stage 'second'", "there is no nowhere"],
    ),
}


@pytest.mark.parametrize(("spoil", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_the_first_stage(tmp_path, spoil, parts):
    plan = pair(tmp_path)
    spoil(plan)
    result = run_cli(tmp_path, plan)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    text = " ".join(result.output.split())
    assert all(part in text for part in parts), text
    assert not (tmp_path / "pair").exists()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("secnod.seed=1", "did you mean 'second'?"),
        ("secnod.training.num_steps=1", "did you mean 'second'?"),
        ("sede=1", "did you mean 'seed'?"),
        ("second.sede=1", "stage 'second': sede: unknown key"),
        ("second", "names no stage and no key"),
        ("seed", "expected the form a.b=value"),
        ("first.backend.start={second}", "{second} names no earlier stage"),
        ("stages=[]", "names no stage and no key"),
    ],
)
def test_wrong_overrides(tmp_path, override, part):
    with pytest.raises(UserError) as caught:
        stages.load(written(tmp_path, pair(tmp_path)), [override])
    assert part in str(caught.value)


def test_a_mistake_in_training_names_the_stage(tmp_path):
    plan = pair(tmp_path, **{"rewards.0.name": "toy.rewards.raises"})
    result = run_cli(tmp_path, plan)
    assert result.exit_code == 2
    text = " ".join(result.output.split())
    assert "error: stage 'second': " in text
    assert "none of the 20 samples" in text
    found = record(tmp_path)
    assert (found["first"]["finished"], found["second"]["finished"]) == (True, False)
    assert found["second"]["cpu_seconds"] > 0


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / stages.RECORD).write_text("{")
    with pytest.raises(UserError, match=r"stages\.json is damaged"):
        stages.read_record(tmp_path)
