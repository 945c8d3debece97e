"""User functions in processes: what fails costs its own sample, and is counted."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmrl.errors import UserError
from mmrl.schema import validate
from mmrl.types import Moment
from rewards import python
from rewards._workers import RUNNER
from rewards.combine import TIMED_OUT, Scorer, parse_specs, scored


def build(function, **config):
    config = {"function": f"users_own.{function}", "workers": 2, **config}
    return python.build(validate(python.Config, config, "rewards[0]"))


def values(outcome):
    return [None if math.isnan(value) else value for value in outcome.values]


def test_values_are_those_of_this_process(group):
    words = ["a", "bb", "print", "dddd"]
    found = scored(build("mmrl", kwargs={"factor": 2.0}), group(words), "r")
    assert values(found) == [2, 4, 10, 8]
    assert values(found) == values(
        scored(build("mmrl", kwargs={"factor": 2.0}, workers=None), group(words), "r")
    )
    assert found.num_failed == 0
    assert found.message is None


def test_failures_cost_their_own_samples(group):
    reward = build("mmrl", sample_timeout_s=2)
    for words, message in (
        (["a", "hang", "bb"], "timed out after 2 s"),
        (["a", "crash", "bb"], "EndedError: the process ended with exit code 7"),
        (["a", "leave", "bb"], "SystemExit: enough"),
        (["a", "raise", "bb"], "ValueError: no judge"),
    ):
        found = scored(reward, group(words), "r")
        assert values(found) == [1, None, 2]
        assert (found.num_failed, found.message) == (1, message)


def test_a_group_that_fails_as_a_whole_is_no_abstention(group):
    found = scored(build("mmrl"), group(["raise"] * 3), "r")
    assert found.num_failed == 3
    assert found.applies


def test_more_that_hang_than_there_are_workers(group):
    found = scored(build("mmrl", sample_timeout_s=0.5), group(["hang"] * 4 + ["a"]), "r")
    assert values(found) == [None] * 4 + [1]
    assert found.message.startswith(TIMED_OUT)


def test_a_process_is_used_again_and_its_own_are_ended(group):
    reward = build("process", workers=1, sample_timeout_s=3)
    first, second = values(scored(reward, group(["a", "b"]), "r"))
    assert first == second
    late, other = values(scored(reward, group(["hang", "b"]), "r"))
    assert late is None or other is None, "threads are served in any order"
    assert values(scored(reward, group(["a"]), "r")) != [first]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert "sleep 613" not in listed.stdout.splitlines()


def test_coroutines_run_side_by_side(group):
    reward = build("network", workers=4)
    scored(reward, group(["0"] * 4), "r")  # starts the processes
    start = time.perf_counter()
    assert values(scored(reward, group(["1"] * 4), "r")) == [1] * 4
    assert time.perf_counter() - start < 3


# --- ways of calling ----------------------------------------------------------------------------


def test_trl(group):
    rolled = group(["a", "hang", "bb"], answer="x")
    assert values(scored(build("trl", signature="trl", sample_timeout_s=2), rolled, "r")) == [
        1, None, 2,
    ]  # fmt: skip
    messages = ({"role": "user", "content": "p"},)
    prompt = replace(rolled.request.prompt, messages=messages, columns={"answer": None})
    rolled = replace(rolled, request=replace(rolled.request, prompt=prompt))
    found = scored(build("trl", signature="trl"), rolled, "r")
    assert values(found) == [None] * 3
    assert not found.applies, "None is not a failure"


def test_trl_with_token_ids_and_metrics(group):
    rolled = group(["a", "raise", "bb"])
    everything = torch.tensor([[True, False], [True, True], [True, True]])
    rolled = replace(
        rolled,
        request=replace(rolled.request, moment=Moment(step=10, num_steps=20, seed=0)),
        mask=everything,
        everything=everything,
        truncated=torch.zeros(3, dtype=torch.bool),
        tokens=[[4], [4, 5], [6, 7]],
    )
    found = scored(build("trl_tokens", signature="trl"), rolled, "r")
    assert values(found) == [11, None, 12]
    assert found.message == "ValueError: no judge"
    assert sorted(found.logged) == [("tokens", 1.0), ("tokens", 2.0)]


def test_verl(group):
    reward = build("verl", signature="verl")
    found = scored(reward, group(["a", "raise"], ground_truth="x"), "r")
    assert values(found) == [1, None]
    assert values(scored(reward, group(["a", "raise"]), "r")) == [None, None]


def test_easyr1_in_lists_of_one(group):
    reward = build("easyr1", signature="easyr1", batched=True, sample_timeout_s=9)
    rolled = group(["a b c", "d"], ground_truth="x")
    assert values(scored(reward, rolled, "r")) == [1, 1], "decisions of the rollout"


def test_pictures(group):
    pictures = [Image.new("RGB", (size, 4)) for size in (3, 5)]
    assert values(scored(build("width"), group(pictures), "r")) == [3, 5]


def test_arrays(group):
    assert values(scored(build("array"), group(["a", "bb"]), "r")) == [1, 2]


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "message"), [("two", "2 values for 1 samples"), ("word", "not 1 numbers")]
)
def test_a_wrong_return_is_a_mistake(group, function, message):
    assert message in str(scored(build(function), group(["a", "b"]), "r").fatal)


def test_a_function_that_its_process_cannot_import(group, monkeypatch):
    reward = build("mmrl")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("rewards")])
    found = scored(reward, group(["a"]), "r")
    assert found.message == f"RuntimeError: {sys.executable} {RUNNER} does not start"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"workers": 0}, r"rewards\[0\]\.workers: .*greater than or equal to 1 \(got 0\)"),
        ({"workers": None, "sample_timeout_s": 1}, "workers or signature: verl or easyr1"),
    ],
)
def test_options_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        build("mmrl", **config)


# --- beside others ------------------------------------------------------------------------------


def test_in_a_scorer(group, caplog):
    entries = [
        {"name": "users_own.mmrl", "label": "own", "workers": 2, "sample_timeout_s": 1},
        {"name": "length", "label": "length", "weight": 0.0},
    ]
    specs = parse_specs(entries)
    assert parse_specs([spec.dump() for spec in specs]) == specs
    with caplog.at_level(logging.WARNING), Scorer(specs) as scorer:
        scorer.submit(group(["a", "hang", "crash"]))
        scorer.submit(group(["a", "bb", "raise"], index=1))
        first, second = scorer.collect()
    assert first.valid.tolist() == [True, False, False]
    assert second.valid.tolist() == [True, True, False]
    assert (first.num_failed["own"], second.num_failed["own"]) == (2, 1)
    assert first.combined.tolist() == [1, 0, 0]
    assert [r.message for r in caplog.records if "'own'" in r.message] == [
        f"reward 'own': 2 of 3 samples not scored: {first.failures['own']} "
        "(rewards/.../failed counts them)"
    ], "said once"


def test_the_runner_loads_no_library():
    code = f"import sys; sys.path.insert(0, {str(RUNNER.parents[1])!r}); " + (
        "import rewards._python_runner; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
