"""Unit tests of generated code in processes with limits."""

from __future__ import annotations

import math
import os
import time

import pytest

from rewards import code_tests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits are those of POSIX")

DOUBLE = "def double(x):\n    return 2 * x\n"
TESTS = ["assert double(2) == 4", "assert double(0) == 0", "assert double(1) == 3"]


def score(code, tests, **config):
    """Of one completion."""
    reward = code_tests.build(code_tests.Config(**config))
    return reward(["p"], [code], tests=[tests]).item()


def test_share_of_passed_tests():
    reward = code_tests.build(code_tests.Config())
    fenced = f"So:\n```python\n{DOUBLE}```\nThat is it."
    columns = [TESTS, TESTS, TESTS[:2], str(TESTS[:2]).replace("'", '"'), TESTS[0], None, []]
    texts = [DOUBLE, "def double(x: no", fenced, fenced, fenced, DOUBLE, DOUBLE]
    found = reward(["p"] * len(texts), texts, tests=columns).tolist()
    assert found[:5] == pytest.approx([2 / 3, 0, 1, 1, 1])
    assert all(map(math.isnan, found[5:]))


def test_another_column():
    reward = code_tests.build(code_tests.Config(target="test_list"))
    assert reward(["p"], [DOUBLE], test_list=[TESTS[:1]]).item() == 1
    assert math.isnan(reward(["p"], [DOUBLE], tests=[TESTS[:1]]).item())


@pytest.mark.parametrize("way_out", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise"])
def test_leaving_is_not_passing(way_out):
    assert score(way_out, ["pass"]) == 0
    assert score("", ["pass", way_out]) == 0.5


def test_what_passed_before_the_time_was_over_counts():
    start = time.perf_counter()
    assert score("", ["pass", "while True: pass", "pass"], limit_s=1) == pytest.approx(1 / 3)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "greedy",
    [
        "x = bytearray(3 * 2**30)",
        "open('large', 'wb').write(bytes(3 * 2**20))",
        "files = [open('f', 'w') for _ in range(100)]",
    ],
)
def test_limits(greedy):
    assert score("", ["pass", greedy]) == 0.5


def test_nothing_is_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    tests = [
        "import os; assert 'SECRET_TOKEN' not in os.environ",
        "import os; assert os.listdir() == []",
        "import sys; assert sys.stdin.read() == ''",
        "import sys; assert sys.flags.isolated",
        "print('noise' * 10**6)",
        "open('small', 'w').write('fits')",
    ]
    assert score("", tests) == 1


def test_folders_and_processes_are_gone_afterwards(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "pid"
    code = f"import os, time\nif os.fork() == 0:\n    time.sleep(60)\nopen({str(path)!r}, 'w')"
    score(code, ["pass"], limit_s=2)
    assert [p for p in tmp_path.iterdir() if p != path] == []


def test_tests_that_are_no_texts():
    with pytest.raises(ValueError, match=r"tests should be a list of texts, not \[1\]"):
        score("", [1])


def test_refused_where_nothing_limits(monkeypatch):
    monkeypatch.setattr(code_tests.os, "name", "nt")
    with pytest.raises(code_tests.UserError, match="not on Windows"):
        code_tests.build(code_tests.Config())
