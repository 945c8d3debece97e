"""The CI script with stand-ins for python, pip, accelerate and pytest: what it runs and refuses."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = "runs/quickstart"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="a bash script")


def executable(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/usr/bin/env bash", *lines, ""]))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def ci(tmp_path):
    """Run the script in a bare copy: ``ci(exact=[...], trains=True)`` -> (exit code, output)."""
    clone, tools = tmp_path / "clone", tmp_path / "tools"
    (clone / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", clone / ".ci/run")
    shutil.copy(ROOT / "README.md", clone / "README.md")

    def run(exact=(0.5, 0.95), trains=True, leave_out=""):
        rows = "\n".join(json.dumps({"step": i, "eval/ocr_exact": x}) for i, x in enumerate(exact))
        (tmp_path / "metrics").write_text(rows + "\n")
        executable(tools / "pip", 'echo "pip $*"')
        executable(tools / "pytest", 'echo "7 passed in 1.00s"')
        executable(
            tools / "accelerate",
            f"mkdir -p {RUN}/final; cp {tmp_path}/metrics {RUN}/metrics.jsonl",
            f"touch {RUN}/report.html {RUN}/final/pytorch_lora_weights.safetensors",
            f"rm -f {RUN}/{leave_out or 'nothing'}",
            f'echo "accelerate $*"; exit {0 if trains else 3}',
        )
        executable(tools / "python", f'exec {sys.executable} "$@"')
        # Stands in for `python3 -m venv FOLDER`: an environment whose programs are those above.
        executable(
            tools / "python3",
            'mkdir -p "$3/bin"; echo "export IN_VENV=1" > "$3/bin/activate"',
        )
        done = subprocess.run(
            [str(clone / ".ci/run")],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"},
        )
        return done.returncode, done.stdout + done.stderr

    run.clone = clone
    return run


def test_runs_both_commands_of_the_readme_and_ends_with_pytest(ci):
    code, output = ci()
    assert code == 0, output
    lines = output.splitlines()
    assert lines[-1] == "7 passed in 1.00s"
    assert "accelerate launch -m mmrl train configs/quickstart.yaml" in lines
    assert "held-out exact match: 0.500 before training, 0.950 after" in lines
    assert [line for line in lines if line.startswith("pip ")] == [
        "pip install -e .",
        "pip install -e .[test]",
    ]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"exact": (0.5, 0.89)}, "ends at 0.890"),
        ({"exact": (0.34, 0.95)}, "starts at 0.340"),
        ({"exact": (0.66, 0.95)}, "starts at 0.660"),
        ({"exact": (0.5, 0.95, 0.6)}, "ends at 0.600"),
        ({"leave_out": "report.html"}, "report.html is missing"),
        ({"leave_out": "final/pytorch_lora_weights.safetensors"}, "weights.safetensors is missing"),
        ({"trains": False}, "accelerate launch"),
    ],
)
def test_a_bad_outcome_fails_before_the_tests(ci, options, complaint):
    code, output = ci(**options)
    assert code != 0
    assert complaint in output
    assert "passed" not in output


def test_a_readme_with_other_commands_is_refused(ci):
    readme = ci.clone / "README.md"
    readme.write_text(readme.read_text().replace("pip install -e . &&", "pip install . &&"))
    code, output = ci()
    assert code != 0
    assert "README.md must print these two commands" in output


def test_an_earlier_run_is_refused(ci):
    (ci.clone / RUN).mkdir(parents=True)
    code, output = ci()
    assert code != 0
    assert "exists already" in output
