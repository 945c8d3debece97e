"""Does the Python code in the completion pass its tests? Run in a process of its own, with limits.

Range: [0, 1], higher is better: the share of passed tests.  The code is the last fenced block of
the completion, or all of it; a test is Python that runs after it, with its names, and passes if
nothing is raised.  NaN where the column of tests is missing or empty.  POSIX only.

The process has no inherited environment, an empty folder of its own that is removed, and limits on
time, memory, file size, open files and, unless it runs as root, on starting processes.  That holds
off accidents, NOT attacks: the code can use the network, read whatever files you can read and write
where you can write, and since it shares a process with its tests, code that sets out to can report
tests as passed.  Run untrusted models inside a container without network or secrets.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.schema import StrictModel
from rewards._answers import code_in, column, is_missing, text_of
from rewards._child import Child, EndedError

PAPER = ""

RUNNER = Path(__file__).with_name("_code_runner.py")


class Config(StrictModel):
    """Which tests are run, and how far they may go."""

    target: str = Field(
        default="tests",
        min_length=1,
        description="column with the tests: a list of Python texts, such a list as JSON, or one "
        "text that is one test",
    )
    limit_s: float = Field(
        default=10.0, gt=0, description="seconds for the code and all its tests together"
    )
    memory_mb: int = Field(default=1024, ge=64, description="address space of the process")
    file_mb: int = Field(default=1, ge=0, description="size of a file it may write")
    workers: int = Field(default=2, ge=1, description="processes at the same time")

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns without which nothing is scored."""
        return (self.target,)


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, texts, **columns) -> [N]`` float32 in [0, 1] or NaN.

    ``UserError`` where processes cannot be limited.  Raises ``TypeError`` when called with anything
    but texts, ``ValueError`` for tests that are no texts.
    """
    if os.name != "posix":
        raise UserError("reward 'code_tests' limits processes as POSIX systems do; not on Windows")

    def score(pair: tuple[str, Any]) -> float:
        tests = tests_in(pair[1])
        return passed(code_in(pair[0]), tests, config) / len(tests) if tests else math.nan

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        texts = [text_of(output) for output in outputs]
        pairs = zip(texts, column(columns, config.target, len(texts)), strict=True)
        with ThreadPoolExecutor(config.workers) as pool:
            return torch.tensor(list(pool.map(score, pairs)), dtype=torch.float32)

    return reward


def tests_in(target: Any) -> list[str]:
    """The tests that a column holds; ``ValueError`` for something else."""
    if is_missing(target):
        return []
    if isinstance(target, str):
        with suppress(ValueError):
            listed = json.loads(target)
            target = listed if isinstance(listed, list) else target
    tests = [target] if isinstance(target, str) else target
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"tests should be a list of texts, not {target!r:.80}")
    return tests


def passed(code: str, tests: Sequence[str], config: Config) -> int:
    """How many tests pass within the limits."""
    word = secrets.token_hex(16)
    task = {
        "code": code,
        "tests": list(tests),
        "word": word,
        "cpu_s": math.ceil(config.limit_s),
        "memory": config.memory_mb * 2**20,
        "file": config.file_mb * 2**20,
    }
    lines = run(json.dumps(task), config.limit_s)
    return sum(f"{word} {i}" in lines for i in range(len(tests)))


def run(task: str, limit_s: float) -> list[str]:
    """What the runner reports about ``task`` until it ends or ``limit_s`` is over."""
    with tempfile.TemporaryDirectory(prefix="mmrl-code-", ignore_cleanup_errors=True) as folder:
        child = _start(folder)
        try:
            child.say(task.encode(), last=True)
            return list(child.lines(limit_s))
        except EndedError:  # before it read the task
            return []
        finally:
            child.end()


def _start(folder: str) -> Child:
    own = {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"}
    return Child(["-I", "-B", str(RUNNER)], cwd=folder, env=own)
