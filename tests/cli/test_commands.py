"""Every command, its output and its exit code; the work behind it is replaced by stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from pydantic import Field
from synthetic_run import METRICS
from typer.testing import CliRunner

import mmrl.runner
from mmrl import cli
from mmrl.errors import UserError
from mmrl.listing import requirements, runs_on
from mmrl.resolve import KINDS, entries
from mmrl.schema import StrictModel

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
RECIPES = ROOT / "configs" / "diffusion" / "tiny-sd3"
COMMANDS = ("train", "check", "eval", "sample", "report", "compare", "list", "doctor")


@pytest.fixture(autouse=True)
def _wide_main_process(monkeypatch):
    """Tables must not wrap, and the environment of a launcher must not leak in."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def invoke(*arguments: object):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


@pytest.fixture
def trained(monkeypatch, run):
    """Replaces training; returns the calls."""
    calls = []

    def train(config, *, resume):
        calls.append((config, resume))
        return run

    monkeypatch.setattr(mmrl.runner, "train", train)
    return calls


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: mmrl {command}" in result.output


def test_help_lists_every_command():
    result = invoke("-h")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)
    assert {c.name or c.callback.__name__ for c in cli.app.registered_commands} == set(COMMANDS)


def test_unknown_commands_and_options_exit_with_2():
    assert invoke("trian").exit_code == 2
    assert invoke("train", QUICKSTART, "--resum").exit_code == 2
    assert invoke("sample", "somewhere").exit_code == 2, "--prompt is required"


# ---------------------------------------------------------------- train, check, eval, sample


def test_train_passes_overrides_and_ends_with_the_table(trained, run):
    result = invoke("train", QUICKSTART, "seed=7", "rewards.0.weight=0.5")
    assert result.exit_code == 0, result.output
    ((config, resume),) = trained
    assert (config.seed, config.rewards[0].weight, resume) == (7, 0.5, False)
    assert "Before and after" in result.output
    assert "0.875" in result.output
    assert str(run / "report.html") in result.output


def test_train_resume(trained):
    assert invoke("train", QUICKSTART, "--resume").exit_code == 0
    assert trained[0][1] is True


def test_train_without_evaluations_prints_no_table(monkeypatch, make_run):
    run = make_run("blind", metrics=METRICS[1:3])
    monkeypatch.setattr(mmrl.runner, "train", lambda config, resume: run)
    result = invoke("train", QUICKSTART)
    assert result.exit_code == 0
    assert "Before and after" not in result.output


def test_check_prints_derived_counts(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("mmrl.preflight.describe", lambda config: [("samples per step", "96")])
    result = invoke("check", QUICKSTART)
    assert result.exit_code == 0
    assert "samples per step" in result.output
    assert "96" in result.output
    assert "valid" in result.output


def test_eval_of_a_configuration_judges_the_base_model(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []

    def evaluate(config, *, run):
        calls.append((config.seed, run))
        return {"eval/exact": 0.5}

    monkeypatch.setattr(mmrl.runner, "evaluate", evaluate)
    result = invoke("eval", QUICKSTART, "seed=3")
    assert result.exit_code == 0
    assert calls == [(3, None)]
    assert "0.500" in result.output
    assert list(tmp_path.iterdir()) == []


def test_eval_of_a_run_writes_a_file(monkeypatch, run):
    (run / "config.yaml").write_text(Path(QUICKSTART).read_text())
    monkeypatch.setattr(
        mmrl.runner, "evaluate", lambda config, run: {"eval/exact": config.seed / 4}
    )
    result = invoke("eval", run, "seed=3")
    assert result.exit_code == 0
    (written,) = run.glob("eval-*.json")
    assert json.loads(written.read_text()) == {
        "overrides": ["seed=3"],
        "values": {"eval/exact": 0.75},
    }


def test_sample_writes_pictures_and_a_grid(monkeypatch, run, tmp_path):
    def sample(folder, prompts, *, count, seed):
        assert (folder, seed) == (run, 5)
        colours = ("red", "blue")
        return [[Image.new("RGB", (8, 4), colours[i])] * count for i in range(len(prompts))]

    monkeypatch.setattr(mmrl.runner, "sample", sample)
    out = tmp_path / "new" / "pictures"
    options = ["--prompt", "one", "--prompt", "two", "--count", 3, "--seed", 5, "--out", out]
    result = invoke("sample", run, *options)
    assert result.exit_code == 0, result.output
    names = {f"{i:03d}-{j:03d}.png" for i in range(2) for j in range(3)}
    assert {path.name for path in out.iterdir()} == names | {"grid.png"}
    assert Image.open(out / "001-002.png").getpixel((0, 0)) == (0, 0, 255)


@pytest.mark.parametrize("bad", [["--count", 0], ["--seed", -1]])
def test_sample_refuses_numbers_out_of_range(run, bad):
    assert invoke("sample", run, "--prompt", "x", *bad).exit_code == 2


# ---------------------------------------------------------------- report, compare, list


def test_report(run):
    result = invoke("report", run)
    assert result.exit_code == 0
    assert (run / "report.html").is_file()


def test_compare(run, make_run, tmp_path):
    other = make_run("other", metrics=METRICS[:1])
    out = tmp_path / "page.html"
    result = invoke("compare", run, other, "--out", out)
    assert result.exit_code == 0
    assert out.is_file()
    (line,) = [line for line in result.output.splitlines() if "exact" in line]
    assert line.split() == ["exact", "0.875", "0.250"], "the latest value of each run"


def test_compare_needs_two_runs(run):
    result = invoke("compare", run)
    assert result.exit_code == 2
    assert "two run folders or more, got 1" in result.output


@pytest.mark.parametrize("kind", [*KINDS, "backends"])
def test_list_of_each_kind(kind):
    result = invoke("list", kind)
    assert result.exit_code == 0
    assert kind in result.output


def test_list_names_summary_and_paper():
    result = invoke("list")
    assert result.exit_code == 0
    (line,) = [line for line in result.output.splitlines() if line.split()[:1] == ["grpo"]]
    assert "arXiv:2402.03300" in line
    assert all(kind in result.output for kind in (*KINDS, "backends"))


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("objectives", "grpo", ""),
        ("objectives", "nft", "implicit_negative, implicit_positive"),
        ("modulators", "adora", "length, truncated"),
        ("selection", "d3s", "entropy"),
        ("regularisers", "orpo_occupancy", "logp_ref"),
        ("rewards", "ocr", ""),
    ],
)
def test_list_says_what_a_part_needs(kind, name, said):
    assert requirements(kind, name) == said


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("objectives", "mhpo", "any"),
        ("objectives", "opd", "diffusion"),
        ("objectives", "mdpo_mirror", "any"),  # one of its forms on images alone
        ("advantages", "copo_consistency", "text, vlm"),  # it compares answers
        ("advantages", "subpo", "any"),
        ("advantages", "optimal_baseline", "any"),
        ("modulators", "dcpo", "text, vlm"),
        ("selection", "pf_ppo", "any"),
        ("regularisers", "kl_reference", "any"),  # velocities of images, k3 of tokens
        ("regularisers", "kl_transition", "diffusion"),
    ],
)
def test_list_says_which_backends_serve_a_part(kind, name, said):
    assert runs_on(kind, name) == said


def test_list_says_how_a_formula_is_known():
    found = {entry.name: entry.evidence for entry in entries("objectives")}
    assert found["etr"] == "reconstructed"
    assert found["gbpo"] == "code"
    assert "(reconstructed)" in invoke("list", "objectives").output


def test_list_of_an_unknown_kind():
    result = invoke("list", "reward")
    assert result.exit_code == 2
    assert "did you mean 'rewards'?" in result.output


# ---------------------------------------------------------------- mistakes and interruptions


@pytest.mark.parametrize(
    ("recipe", "change", "parts"),
    [
        ("flow-grpo", "kernel=flow_sed", ["likelihood.kernel", "'flow_sed'", "mean 'flow_sde'?"]),
        ("flow-grpo", "steps.select=windw", ["likelihood.steps.select", "mean 'window'?"]),
        ("flow-grpo", "noise_level=0", ["adds no noise", "likelihood.noise_level"]),
        ("flow-grpo-fast", "steps.size=9", ["likelihood.steps.size = 9; allowed: 1 to"]),
        ("grpo-guard", "kernel=cps", ["'grpo_guard' needs mean_gap_old", "'flow_sde' or 'dance"]),
        ("nft", "behaviour=current", ["'nft' needs implicit_negative", "behaviour = 'ema'"]),
    ],
)
def test_mistakes_in_a_likelihood(monkeypatch, recipe, change, parts):
    monkeypatch.chdir(ROOT)
    result = invoke("check", RECIPES / f"{recipe}.yaml", f"backend.likelihood.{change}")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert [part for part in parts if part not in said] == []


def test_check_names_steps_that_are_never_trained(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = invoke("check", RECIPES / "flow-grpo.yaml")
    assert result.exit_code == 0
    assert "never trained step 9 ends at sigma = 0" in " ".join(result.output.split())


def test_check_says_where_guidance_counts(monkeypatch):
    monkeypatch.chdir(ROOT)
    said = "images are drawn under 4.5"
    assert said in invoke("check", QUICKSTART, "backend.rollout.guidance=4.5").output
    assert said not in invoke("check", QUICKSTART).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml"], "configuration file not found: absent.yaml"),
        (["check", QUICKSTART, "trainng.num_steps=1"], "did you mean 'training'?"),
        (["check", QUICKSTART, "training.num_steps=0"], "training.num_steps"),
        (["check", QUICKSTART, "objective.name=grop"], "did you mean 'grpo'?"),
        (["check", QUICKSTART, "novalue"], "expected the form a.b=value"),
        (["eval", "absent"], "configuration file not found: absent"),
        (["sample", "absent", "--prompt", "x"], "run folder not found: absent"),
        (["report", "absent"], "run folder not found: absent"),
        (["compare", "absent", "absent"], "run folder not found: absent"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.output.startswith("error: ")
    assert message in result.output


class Section(StrictModel):
    """A record made outside of the configuration reader."""

    size: int = Field(ge=1)


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (UserError("reward 'x' [bold]raised[/]"), 2, "error: reward 'x' [bold]raised[/]"),
        (KeyboardInterrupt(), 130, "interrupted:"),
        (KeyboardInterrupt("saved step 5"), 130, "interrupted: saved step 5"),
    ],
)
def test_exit_codes_of_exceptions(monkeypatch, raised, code, message):
    def fail(config, resume):
        raise raised

    monkeypatch.setattr(mmrl.runner, "train", fail)
    result = invoke("train", QUICKSTART)
    assert result.exit_code == code
    assert message in result.output


def test_pydantic_errors_are_mistakes(monkeypatch):
    monkeypatch.setattr(mmrl.runner, "train", lambda config, resume: Section(size=0))
    result = invoke("train", QUICKSTART)
    assert result.exit_code == 2
    assert "size: Input should be greater than or equal to 1" in result.output


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(config, resume):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(mmrl.runner, "train", fail)
    assert isinstance(invoke("train", QUICKSTART).exception, ZeroDivisionError)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_other_processes_are_silent_and_write_nothing(
    monkeypatch, trained, run, tmp_path, variable
):
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(mmrl.runner, "evaluate", lambda config, run: {"eval/exact": 1.0})
    monkeypatch.setattr(mmrl.runner, "sample", lambda *a, **k: [[Image.new("RGB", (4, 4))] * 4])
    out = tmp_path / "out"
    (run / "config.yaml").write_text(Path(QUICKSTART).read_text())
    before = set(run.rglob("*"))
    for arguments in (
        ["train", QUICKSTART],
        ["eval", run],
        ["sample", run, "--prompt", "x", "--out", out],
        ["report", run],
        ["compare", run, run, "--out", out],
        ["list"],
    ):
        result = invoke(*arguments)
        assert (result.exit_code, result.output) == (0, ""), arguments
    assert set(run.rglob("*")) == before
    assert not out.exists()


def test_errors_of_other_processes_are_shown_with_their_number(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    result = invoke("train", "absent.yaml")
    assert result.exit_code == 2
    assert result.output.startswith("[process 3] error: ")


def test_the_program_itself():
    """One real process: exit code, streams, and no traceback."""
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "mmrl", "check", QUICKSTART, "training.group_sise=2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: training.group_sise: unknown key")
    assert "did you mean 'group_size'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_loads_no_model_library():
    code = "import sys, mmrl.cli; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"diffusers", "transformers", "accelerate", "peft", "matplotlib", "rapidocr"}
    assert not heavy & set(done.stdout.split())


def test_main_is_the_installed_entry_point(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "app", lambda **options: seen.append(options))
    cli.main()
    assert seen == [{"prog_name": "mmrl"}]
    assert issubclass(cli.Commands, typer.core.TyperGroup)
