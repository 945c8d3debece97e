"""What a user can get wrong: one message, exit code 2, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from toy.run import metrics_of, toy_config
from typer.testing import CliRunner

from mmrl.cli import app

ROOT = Path(__file__).resolve().parents[2]


def run_cli(folder: Path, *overrides: str, command: str = "train"):
    """``mmrl train`` on the toy configuration, in this process."""
    (folder / "toy.yaml").write_text(yaml.safe_dump(toy_config(folder)))
    return CliRunner().invoke(app, [command, str(folder / "toy.yaml"), *overrides])


MISTAKES = [
    ("objective.clip_lwo=0.1", ["objective.clip_lwo", "did you mean 'clip_low'"]),
    ("trainning.num_steps=1", ["trainning", "did you mean 'training'"]),
    ("training.num_stepz=1", ["training.num_stepz", "did you mean 'num_steps'"]),
    ("objective.name=grop", ["objective.name", "'grop'", "did you mean 'grpo'"]),
    ("advantage.name=gruop", ["did you mean 'group'"]),
    ("rewards.0.name=ocrr", ["rewards[0]", "did you mean 'ocr'"]),
    ("rewards.0.wieght=2", ["rewards[0].wieght", "did you mean 'weight'"]),
    ("backend.name=difusion", ["did you mean 'diffusion'"]),
    ("backend.decisons=2", ["backend.decisons", "did you mean 'decisions'"]),
    ("training.num_steps=many", ["training.num_steps", "'many'", "integer"]),
    ("training.num_steps=0", ["training.num_steps", "greater than or equal to 1", "0"]),
    ("optimizer.learning_rate=-1", ["optimizer.learning_rate", "greater than 0", "-1"]),
    ("optimizer.learning_rate=.inf", ["optimizer.learning_rate", "finite"]),
    ("optimizer.schedule=cosin", ["optimizer.schedule", "'cosine'", "cosin"]),
    ("training.aggregation=mean", ["training.aggregation", "decision_mean"]),
    ("training.aggregation=sample_sum_over_horizon", ["training.horizon"]),
    ("training.group_size=1", ["training.group_size", "'group'", "2 or more"]),
    ("training.prompts_per_step=7", ["training.prompts_per_step", "6 prompts"]),
    ("training.updates_per_epoch=21", ["training.updates_per_epoch", "20 samples"]),
    ("prompts.source=missing.jsonl", ["prompts.source", "not found", "missing.jsonl"]),
    ("evaluation.source=missing.jsonl", ["evaluation.source", "not found"]),
    ("regularisers.0.estimator=velocity", ["'kl_reference' needs velocity_gap_reference"]),
    ("rewards=[]", ["rewards", "at least 1"]),
    ("training", ["override 'training'", "a.b=value"]),
    ("rewards.3.weight=1", ["rewards.3.weight", "list of 1"]),
    ("name=a/b", ["name", "a/b"]),
    ("rewards.0.name=toy.rewards.nothing", ["toy.rewards", "nothing"]),
    ("rewards.0.name=no_such_package.f", ["no_such_package"]),
    ("rewards.0.name=toy.rewards.raises", ["failed on all 12 samples", "server is down"]),
    ("rewards.0.name=toy.rewards.always_nan", ["none of the 20 samples", "'near'"]),
    ("rewards.0.name=toy.rewards.one_too_many", ["returned 3 values for 2 samples"]),
]


@pytest.mark.parametrize(("override", "parts"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_one_message_and_exit_code_2(tmp_path, override, parts):
    result = run_cli(tmp_path, override)
    assert result.exit_code == 2, result.output
    for part in parts:
        assert part in result.output.replace("\n", " ").replace("  ", " ")
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ('{"prompt": "a"}\n{"prompt": \n', ":2: not valid JSON"),
        ('{"prompt": "a"}\n["b"]\n', ":2: expected an object"),
        ('{"text": "a"}\n', ":1: needs a non-empty string under 'prompt'"),
        ('{"prompt": "  "}\n', ":1: needs a non-empty string under 'prompt'"),
    ],
)
def test_malformed_prompts_name_the_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    result = run_cli(tmp_path, f"prompts.source={path}")
    assert result.exit_code == 2
    assert message in result.output.replace("\n", "")


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_missing_model_is_named(command):
    path = str(ROOT / "configs" / "quickstart.yaml")
    overrides = ["backend.model.path=no/such/model", f"prompts.source={ROOT}/README.md"]
    prompts = ROOT / "tests" / "train" / "prompts.jsonl"
    overrides[1] = f"prompts.source={prompts}"
    overrides += [f"evaluation.source={prompts}", "training.prompts_per_step=1"]
    result = CliRunner().invoke(app, [command, path, *overrides])
    assert result.exit_code == 2, result.output
    assert "no/such/model" in result.output


def test_a_hanging_reward_makes_its_samples_invalid_and_is_counted(tmp_path):
    result = run_cli(
        tmp_path,
        "rewards.0.name=toy.rewards.hangs_on_first",
        "rewards.0.timeout_s=0.3",
        "training.num_steps=2",
        "evaluation.source=null",
    )
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path / "toy")
    # Six prompts in two steps of four: the hanging one comes at most once a step.
    assert sum(line.get("rewards/near/failed", 0) for line in lines) >= 5
    assert all(line["invalid_samples"] in (0.0, 5.0) for line in lines)
    assert all(line["reward"] is not None for line in lines)


def test_check_prints_the_arithmetic(tmp_path):
    result = run_cli(tmp_path, command="check")
    assert result.exit_code == 0
    for part in (
        "20 = 4 prompts x 5",
        "5 per optimizer step",
        "6 = 6 steps x 1",
        "120",
        "12 samples",
    ):
        assert part in result.output


def test_check_of_the_written_configuration_round_trips(tmp_path, toy):
    run = toy("training.num_steps=1", "training.group_size=2")
    result = CliRunner().invoke(app, ["check", str(run / "config.yaml")])
    assert result.exit_code == 0
    assert "8 = 4 prompts x 2" in result.output
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"]
