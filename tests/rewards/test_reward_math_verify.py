"""Mathematical equality, by the package math-verify."""

from __future__ import annotations

import importlib.util
import math
import sys
import threading
import time

import pytest

from mmrl.errors import UserError
from rewards import math_verify
from rewards._child import Child, Pool

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)


@pytest.fixture(scope="module")
def build():
    """Rewards by their settings, each with one process."""
    built = {}

    def make(**config):
        key = tuple(config.items())
        return built.setdefault(key, math_verify.build(math_verify.Config(**config)))

    return make


@needs_package
@pytest.mark.parametrize(
    ("text", "target", "config", "expected"),
    [
        (r"thus $\frac{1}{2}$", "0.5", {}, 1),
        (r"thus \boxed{\frac{2}{4}}", r"\frac{1}{2}", {}, 1),
        ("it is 72.", "9 * 8\n#### 72", {}, 1),
        ("it is 71.", 72, {}, 0),
        ("<answer>x^2 + 2x + 1</answer>", "(x+1)^2", {"where": "tag"}, 1),
        ("(x+1)^2", "(x+1)^2", {"where": "tag"}, 0),
        ("<answer>\\{1,\n2\\}</answer>", r"\{2, 1\}", {"where": "tag"}, 1),
        ("no idea", "5", {}, 0),
    ],
)
def test_forms_of_a_number_or_a_formula(build, text, target, config, expected):
    assert build(**config)(["p"], [text], answer=[target]).item() == expected


@needs_package
@pytest.mark.parametrize("target", [None, "", "####"])
def test_no_target_is_no_zero(build, target):
    assert math.isnan(build()(["p"], ["5"], answer=[target]).item())


@needs_package
def test_what_never_ends_costs_its_own_sample_only():
    reward = math_verify.build(math_verify.Config(limit_s=4))
    texts = ["$1/2$", "$9^{9^{9^{9}}}$", "$1/2$"]
    found = []

    def call():
        found.extend(reward(["p"] * 3, texts, answer=["0.5"] * 3).tolist())

    thread = threading.Thread(target=call)  # no signal reaches it
    start = time.perf_counter()
    thread.start()
    thread.join()
    assert found == [1, 0, 1]
    assert time.perf_counter() - start < 30


QUESTION = {"right": "$2$", "found": "$2$", "digits": 6, "limit_s": 5}


@needs_package
def test_a_process_that_died_is_started_again():
    started = []

    def start():
        started.append(Child([str(math_verify.RUNNER)]))
        started[-1].await_ready()
        return started[-1]

    judge = Pool(start, 1)
    assert math_verify.verdict(judge, QUESTION) == 1
    started[0].end()
    assert math_verify.verdict(judge, QUESTION) == 0
    assert math_verify.verdict(judge, QUESTION) == 1
    assert len(started) == 2


def test_a_process_that_does_not_start(monkeypatch, tmp_path):
    monkeypatch.setattr(math_verify, "RUNNER", tmp_path / "none.py")
    with pytest.raises(RuntimeError, match=r"none\.py does not start"):
        math_verify.verdict(Pool(math_verify._start, 1), QUESTION)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"'math_verify' needs.*pip install 'mmrl\[math\]'"):
        math_verify.build(math_verify.Config())
