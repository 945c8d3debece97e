"""What a user can get wrong: one message, exit code 2, no traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from toy.run import metrics_of, toy_config
from typer.testing import CliRunner

from mmrl.checkpoint import found
from mmrl.cli import app
from mmrl.config import apply_overrides, parse
from mmrl.errors import UserError
from mmrl.preflight import load_prompt_sets, prompt_notes, refuse_unless_consistent
from mmrl.prompts.dataset import load_prompts

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
    (
        "training.count_empty=true",
        ["training.count_empty", "'decision_mean'", "sample_mean_of_means"],
    ),
    ("training.group_size=1", ["training.group_size", "'group'", "2 or more"]),
    ("training.prompts_per_step=7", ["training.prompts_per_step", "6 prompts"]),
    ("training.updates_per_epoch=21", ["training.updates_per_epoch", "20 samples"]),
    ("prompts.source=missing.jsonl", ["prompts.source", "not found", "missing.jsonl"]),
    ("evaluation.source=missing.jsonl", ["evaluation.source", "not found"]),
    ("prompts.keys={truth: answr}", ["prompts.source", ":1: no column 'answr' (keys.truth)"]),
    ("evaluation.keys={truth: answr}", ["evaluation.source", ":1: no column 'answr'"]),
    ("rewards=[{name: exact_match, target: txet}]", ["rewards[0]: 'exact_match' reads", "'txet'"]),
    (
        "evaluation.rewards=[{name: code_tests}]",
        ["evaluation.rewards[0]: 'code_tests' reads", "'tests'", "no prompt has"],
    ),
    ("prompts.keys=[answer]", ["prompts.keys", "dictionary"]),
    ("regularisers.0.estimator=velocity", ["'kl_reference' needs velocity_gap_reference"]),
    ("training.num_steps=true", ["training.num_steps", "true or false"]),
    ("seed=4294967296", ["seed", "less than 4294967296"]),
    ("optimizer.betas=[2,3]", ["optimizer.betas", "less than 1"]),
    ("backend.terms=[logp_ref]", ["objective: 'grpo' needs logp", "provides logp_ref"]),
    ("tracking.trackers=[mlflow]", ["tracking.trackers", "'mlflow' is not installed"]),
    ("rewards=[]", ["rewards", "at least 1"]),
    ("training", ["override 'training'", "a.b=value"]),
    ("rewards.3.weight=1", ["rewards.3.weight", "list of 1"]),
    ("name=a/b", ["name", "a/b"]),
    ("rewards.0.name=toy.rewards.nothing", ["toy.rewards", "nothing"]),
    ("rewards.0.name=no_such_package.f", ["no_such_package"]),
    (
        "rewards.0.name=toy.rewards.raises",
        ["none of the 20", "'near' failed on all", "is down"],
    ),
    (
        "rewards.0.name=toy.rewards.always_nan",
        ["none of the 20", "no value (NaN) from 'near'"],
    ),
    ("rewards.0.name=toy.rewards.one_too_many", ["returned 3 values for 2 samples"]),
    ("rewards.0.tasks=[walk]", ["rewards[0].tasks", "'walk'", "they have no column 'task'"]),
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


def with_answers(folder: Path, *answers, **more) -> str:
    """An override: prompts with these answers, ``...`` where there is no such column."""
    rows = [
        {"prompt": f"go to {i}", "target": 1.0, **more} | ({} if a is ... else {"answer": a})
        for i, a in enumerate(answers)
    ]
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"source={path}"


EXACT = "[{name: toy.rewards.near_target}, {name: exact_match, weight: 0}]"


@pytest.mark.parametrize("empty", [None, "", " ", []])
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_column_that_is_empty_in_every_prompt_is_refused(tmp_path, empty, command):
    source = with_answers(tmp_path, *[empty] * 5, text="5")
    result = run_cli(tmp_path, f"prompts.{source}", f"rewards={EXACT}", command=command)
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert "rewards[1]: 'exact_match' reads the column 'answer', which is empty in each" in text
    assert "answers.jsonl:1: prompt 'go to 0'; other columns: target, text" in text


def test_prompts_without_what_a_reward_reads_are_counted(tmp_path):
    both = EXACT[:-1] + ", {name: math_verify, weight: 0}]"
    source = with_answers(tmp_path, "5", "", ..., None, "0")
    overrides = (f"prompts.{source}", f"rewards={both}", f"evaluation.{source}")
    config = parse(apply_overrides(toy_config(tmp_path), overrides))
    training, evaluation = load_prompt_sets(config)
    path = tmp_path / "answers.jsonl"
    what = "column 'answer' is empty or missing in 3 of 5 prompts,"
    assert prompt_notes(config, training, evaluation) == [
        f"rewards: 'exact_match', 'math_verify': {what} first in {key}.source: {path}:2: prompt "
        "'go to 1'"
        for key in ("prompts", "evaluation")
    ]
    assert prompt_notes(config, training[:1], evaluation[-1:]) == []
    for command in ("check", "train"):
        result = run_cli(tmp_path, *overrides[:1], f"rewards={EXACT}", "training.num_steps=1",
                         command=command)  # fmt: skip
        assert result.exit_code == 0, result.output
        assert "empty or missing in 3 of 5 prompts" in " ".join(result.output.split())


@pytest.mark.parametrize("section", ["", "evaluation."])
def test_a_misspelt_task_of_a_reward_is_named(tmp_path, section):
    source = tmp_path / "prompts.jsonl"
    rewards = "[{name: toy.rewards.near_target, tasks: [walk, rnu]}]"
    result = run_cli(
        tmp_path,
        *(f"{key}.source={{walk: {source}, run: {source}}}" for key in ("prompts", "evaluation")),
        f"{section}rewards={rewards}",
        command="check",
    )
    assert result.exit_code == 2, result.output
    text = " ".join(result.output.split())
    assert f"{section}rewards[0].tasks: no prompt has the task 'rnu'; did you mean 'run'?" in text


@pytest.mark.parametrize("command", ["train", "check"])
def test_a_missing_model_is_named(tmp_path, command):
    path = str(ROOT / "configs" / "quickstart.yaml")
    prompts = ROOT / "tests" / "train" / "prompts.jsonl"
    overrides = [
        "backend.model.path=no/such/model",
        f"output_dir={tmp_path / 'run'}",
        f"prompts.source={prompts}",
        f"evaluation.source={prompts}",
        "training.prompts_per_step=1",
    ]
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


def test_hanging_alone_costs_steps_and_ends_the_run_only_when_it_goes_on(tmp_path):
    """One prompt a step: now and then no sample of a step has a reward."""
    options = (
        "rewards.0.name=toy.rewards.hangs_on_first",
        "rewards.0.timeout_s=0.3",
        "training.prompts_per_step=1",
        "training.num_steps=12",
        "evaluation.source=null",
    )
    result = run_cli(tmp_path, *options)
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path / "toy")
    skipped = [line for line in lines if line.get("skipped_steps")]
    assert len(skipped) == 2, "the hanging prompt comes once in each shuffle of six"
    assert all(line["reward"] is None for line in skipped)
    again = run_cli(tmp_path, *options, "name=strict", "training.max_unscored_steps=1")
    assert again.exit_code == 2
    assert "timed out after 0.3 s" in again.output


def test_a_reward_that_fails_on_some_prompts_is_counted(tmp_path):
    result = run_cli(tmp_path, "rewards.0.name=toy.rewards.fails_on_first")
    assert result.exit_code == 0, result.output
    lines = metrics_of(tmp_path / "toy")
    assert sum(line.get("rewards/near/failed", 0) for line in lines) >= 15
    assert [x["eval/near_unjudged"] for x in lines if "eval/near" in x] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "holds another run; continue it with --resume"),
        (("--resume", "training.group_size=6"), "training.group_size: 5 -> 6"),
        (("--resume",), "corrupt checkpoint"),
    ],
)
def test_a_folder_of_another_run_or_a_corrupt_checkpoint(tmp_path, toy, overrides, message):
    last = found(toy())[-1]
    (last / "weights.safetensors").write_bytes(b"broken")
    result = run_cli(tmp_path, *overrides)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")


def test_resume_of_a_folder_with_other_files(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "thesis.tex").write_text("years of work")
    result = run_cli(tmp_path, "--resume")
    assert result.exit_code == 2
    assert "no run to resume" in result.output


def test_a_diverging_run_and_one_that_learns_nothing_exit_with_2(tmp_path):
    diverged = run_cli(tmp_path, "backend.poison_step=1", "training.max_bad_updates=1")
    assert diverged.exit_code == 2
    assert "not finite" in diverged.output
    constant = ("rewards.0.name=toy.rewards.constant", "regularisers=[]", "name=still")
    still = run_cli(tmp_path, *constant, "optimizer.weight_decay=0")
    assert still.exit_code == 2
    assert "identical to the initial" in still.output.replace("\n", " ")


def test_prompts_in_another_encoding_name_the_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "a"}\n{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
    result = run_cli(tmp_path, f"prompts.source={path}")
    assert result.exit_code == 2
    assert ":2: not valid JSON" in result.output.replace("\n", "")


def test_other_line_separators_may_stand_in_a_prompt(tmp_path):
    path = tmp_path / "separators.jsonl"
    path.write_text('{"prompt": "a\u2028b"}\n{"prompt": "c"}\n', encoding="utf-8")
    assert [p.text for p in load_prompts(path, "prompts.source")] == ["a\u2028b", "c"]


def test_tensorboard_files_are_written(tmp_path):
    result = run_cli(tmp_path, "tracking.trackers=[tensorboard]", "training.num_steps=1")
    assert result.exit_code == 0, result.output
    assert list((tmp_path / "toy" / "tensorboard").rglob("events.out.tfevents.*"))


def test_check_prints_the_arithmetic(tmp_path):
    result = run_cli(tmp_path, command="check")
    assert result.exit_code == 0
    for part in (
        "20 = 4 prompts x 5",
        "20 per optimizer step, of at most 3 decisions",
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


def test_prompts_of_several_files(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    second.write_text('{"prompt": "y"}\n{"prompt": "z", "task": "t"}\n')
    prompts = load_prompts([first, second], "prompts.source")
    assert [p.text for p in prompts] == ["x", "y", "z"]
    second.write_text("")
    with pytest.raises(UserError, match=r"prompts file is empty: .*b\.jsonl"):
        load_prompts([first, second], "prompts.source")


def test_prompts_of_several_tasks(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text('{"prompt": "x", "text": "X"}\n')
    second.write_text('{"prompt": "y"}\n')
    prompts = load_prompts({"read": first, "both": [first, second]}, "prompts.source")
    assert [(p.text, p.columns["task"]) for p in prompts] == [
        ("x", "read"),
        ("x", "both"),
        ("y", "both"),
    ]
    assert prompts[0].columns["text"] == "X"
    assert len({p.id for p in prompts}) == 3
    with pytest.raises(UserError, match=r"prompts\.source\.other: prompts file not found"):
        load_prompts({"other": tmp_path / "none.jsonl"}, "prompts.source")
    second.write_text('{"prompt": "y", "task": "theirs"}\n')
    with pytest.raises(UserError, match="prompt 'y' is of the task 'theirs' by its column"):
        load_prompts({"both": second}, "prompts.source")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"name": "nft"}}, "put the modulator 'optimality' last"),
        ({"modulators": [{"name": "optimality"}]}, "it belongs to 'nft'"),
        (
            {
                "objective": {"name": "nft"},
                "modulators": [{"name": "optimality"}, {"name": "drop_zero"}],
            },
            "put the modulator 'optimality' last",
        ),
        ({"advantage": {"name": "per_reward"}}, "has weight 0.5, but advantage 'per_reward'"),
        (
            {"advantage": {"name": "g2rpo", "per_reward": True}},
            "has weight 0.5, but advantage 'g2rpo'",
        ),
    ],
)
def test_parts_that_would_misread_each_other(tmp_path, changes, message):
    terms = ["logp", "logp_ref", "implicit_positive", "implicit_negative"]
    data = toy_config(tmp_path) | changes
    data["backend"] = {"name": "toy.gauss", "terms": terms}
    data["rewards"][0]["weight"] = 0.5
    with pytest.raises(UserError, match=message):
        refuse_unless_consistent(parse(data))


def test_a_correction_of_what_no_sampler_knows(tmp_path):
    data = toy_config(tmp_path) | {"correction": "importance_sampling"}
    with pytest.raises(UserError, match="correction: 'importance_sampling' needs logp_sampled"):
        refuse_unless_consistent(parse(data))
    data["backend"] = {"name": "toy.gauss", "terms": ["logp", "logp_ref", "logp_sampled"]}
    refuse_unless_consistent(parse(data))
    data["correction"] = {"name": "importance_sampling", "level": "sample"}
    data["training"]["micro_batch_size"] = 2
    with pytest.raises(UserError, match=r"splits the 3 decisions .* correction\.level 'sample'"):
        refuse_unless_consistent(parse(data))
    with pytest.raises(UserError, match=r"correction\.name: .*did you mean 'importance_sampling'"):
        parse(data | {"correction": "importance_sampler"})
    with pytest.raises(
        UserError, match=r"correction\.capp: unknown key 'capp'; did you mean 'cap'"
    ):
        parse(data | {"correction": {"name": "importance_sampling", "capp": 2}})
    assert parse(data | {"correction": None}).dump()["correction"] is None
    assert parse(parse(data).dump()).correction == parse(data).correction


def test_divergence_in_the_reward(tmp_path):
    data = toy_config(tmp_path) | {"kl_in_reward": {"coef": 0.1}, "regularisers": []}
    refuse_unless_consistent(parse(data))
    assert parse(parse(data).dump()).kl_in_reward == parse(data).kl_in_reward
    assert parse(data | {"kl_in_reward": None}).kl_in_reward is None
    blind = data | {"advantage": {"name": "per_reward"}}
    with pytest.raises(UserError, match="kl_in_reward: advantage 'per_reward' normalises each"):
        refuse_unless_consistent(parse(blind))
    without = data | {"backend": {"name": "toy.gauss", "terms": ["logp"]}}
    with pytest.raises(UserError, match="kl_in_reward needs logp_ref, which backend"):
        refuse_unless_consistent(parse(without))
    for value, message in [
        ({"coef": 0}, r"kl_in_reward\.coef: .*greater than 0"),
        ({"estimator": "k4"}, r"kl_in_reward\.estimator: .*'k1', 'k2' or 'k3'"),
        ({"coeff": 1}, r"kl_in_reward\.coeff: unknown key 'coeff'; did you mean 'coef'"),
    ]:
        with pytest.raises(UserError, match=message):
            parse(data | {"kl_in_reward": value})


@pytest.mark.parametrize(
    "reward", [{"name": "soft_overlong"}, {"name": "length", "unit": "tokens"}]
)
def test_a_reward_on_tokens_where_there_are_none(tmp_path, reward):
    data = toy_config(tmp_path) | {"rewards": [reward]}
    with pytest.raises(UserError, match="counts tokens, which the samples of backend 'toy"):
        refuse_unless_consistent(parse(data))


def test_weights_of_rewards_count_where_their_sum_is_ranked(tmp_path):
    data = toy_config(tmp_path) | {"advantage": {"name": "g2rpo"}}
    data["rewards"][0]["weight"] = 0.5
    refuse_unless_consistent(parse(data))


@pytest.mark.parametrize(("steps", "noted"), [(2, True), (3, False)])
def test_a_budget_that_never_meets_a_prompt_again_is_told(tmp_path, steps, noted):
    """Of six prompts three are drawn in each step."""
    overrides = ["prompts.budget={name: knapsack, max_size: 8}", "training.prompts_per_step=3"]
    config = apply_overrides(toy_config(tmp_path), [*overrides, f"training.num_steps={steps}"])
    notes = prompt_notes(parse(config), *load_prompt_sets(parse(config)))
    told = ["prompts.budget: 'knapsack' learns from earlier visits of a prompt, but this run draws "
            "6 of 6 prompts: where none comes twice, every group has group_size"]  # fmt: skip
    assert notes == (told if noted else [])
