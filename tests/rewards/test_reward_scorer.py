"""Scoring in the background: sums, masks, failures, timeouts, overlap."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from types import ModuleType

import numpy as np
import pytest
import torch

from mmrl.errors import UserError
from rewards.combine import TIMED_OUT, Scorer, parse_specs

NAN = math.nan
# Long enough that a healthy call never meets it, short enough for a test.
TIMEOUT = 1.5


@pytest.fixture
def scorer(monkeypatch):
    """``scorer(f=function, g=(function, {"weight": 2.0}))``: a Scorer of those functions."""
    module = ModuleType("users_rewards")
    monkeypatch.setitem(sys.modules, "users_rewards", module)
    made = []

    def make(**functions):
        entries = []
        for name, given in functions.items():
            function, settings = given if isinstance(given, tuple) else (given, {})
            setattr(module, name, function)
            entries.append({"name": f"users_rewards.{name}", "label": name, **settings})
        made.append(Scorer(parse_specs(entries)))
        return made[-1]

    yield make
    for each in made:
        each.close()


def returning(value):
    return lambda prompts, outputs, **columns: value


def echo(prompts, outputs, **columns):
    return list(outputs)


def score(scorer, *groups):
    for group in groups:
        scorer.submit(group)
    return scorer.collect()


def values(tensor):
    """As a list, with None for NaN: NaN never equals itself."""
    return [None if math.isnan(value) else value for value in tensor.tolist()]


# --- sums and masks -----------------------------------------------------------------------------


def test_weighted_sum_in_submit_order(scorer, group):
    both = scorer(f=(echo, {"weight": 0.5}), g=(returning([1.0, 10.0]), {"weight": -2.0}))
    first, second = score(both, group([3.0, 4.0], index=7), group([5.0, 6.0], index=2))
    assert (first.index, second.index) == (7, 2)
    assert first.combined.tolist() == [0.5 * 3 - 2 * 1, 0.5 * 4 - 2 * 10]
    assert second.combined.tolist() == [0.5 * 5 - 2 * 1, 0.5 * 6 - 2 * 10]
    assert first.combined.dtype == first.by_name["f"].dtype == torch.float64
    assert first.by_name["f"].tolist() == [3.0, 4.0]
    assert first.by_name["g"].tolist() == [1.0, 10.0]
    assert first.valid.tolist() == [True, True]
    assert first.failures == {}
    assert first.num_failed == {"f": 0, "g": 0}
    assert first.seconds > 0


def test_not_applicable_is_invalid_but_no_failure(scorer, group):
    both = scorer(f=(echo, {"weight": 2.0}), g=returning([1.0, 1.0, NAN]))
    (scores,) = score(both, group([None, 4.0, 5.0]))
    assert values(scores.by_name["f"]) == [None, 4.0, 5.0]
    assert scores.valid.tolist() == [False, True, False]
    assert scores.combined.tolist() == [0.0, 9.0, 0.0]
    assert scores.num_failed == {"f": 0, "g": 0}
    assert scores.failures == {}


def test_a_reward_that_does_not_apply_to_a_prompt_leaves_the_others(scorer, group):
    both = scorer(f=(echo, {"weight": 2.0}), g=returning([NAN, None]))
    (scores,) = score(both, group([3.0, 4.0]))
    assert scores.valid.tolist() == [True, True]
    assert scores.combined.tolist() == [6.0, 8.0]
    assert scores.num_asked == {"f": 2, "g": 2}


def test_scores_carry_the_task_of_their_prompt(scorer, group):
    groups = group([1.0], task="ocr"), group([2.0], index=1)
    assert [scores.task for scores in score(scorer(f=echo), *groups)] == ["ocr", ""]


def test_a_reward_of_some_tasks_is_not_asked_about_others(scorer, group):
    asked = []

    def strict(prompts, outputs, task, **columns):
        asked.extend(task)
        return [1.0] * len(outputs)

    both = scorer(f=(strict, {"tasks": ["a", "b"]}), g=echo)
    groups = [group([3.0, 4.0], task=task) for task in ("a", "c", "b")] + [group([5.0])]
    scores = score(both, *groups)
    assert asked == ["a", "a", "b", "b"]
    assert [values(each.by_name["f"]) for each in scores] == [
        [1.0, 1.0], [None, None], [1.0, 1.0], [None]
    ]  # fmt: skip
    assert [each.combined.tolist() for each in scores] == [
        [4.0, 5.0],
        [3.0, 4.0],
        [4.0, 5.0],
        [5.0],
    ]
    assert all(each.valid.all() and not each.failures for each in scores)
    assert all(each.num_failed == {"f": 0, "g": 0} for each in scores)
    assert [each.num_asked for each in scores] == [
        {"f": 2, "g": 2}, {"f": 0, "g": 2}, {"f": 2, "g": 2}, {"f": 0, "g": 1}
    ]  # fmt: skip


def test_a_reward_that_failed_is_not_one_that_does_not_apply(scorer, group):
    (scores,) = score(scorer(f=echo, g=returning([math.inf, math.inf])), group([3.0, 4.0]))
    assert scores.valid.tolist() == [False, False]


def test_nowhere_applicable_is_no_error(scorer, group):
    (scores,) = score(scorer(f=returning([NAN, None])), group([1, 2]))
    assert scores.valid.tolist() == [False, False]


def test_weight_zero_is_logged_only(scorer, group):
    both = scorer(f=echo, g=(returning([NAN, 7.0]), {"weight": 0.0}))
    (scores,) = score(both, group([1.0, 2.0]))
    assert scores.valid.tolist() == [True, True]
    assert scores.combined.tolist() == [1.0, 2.0]
    assert values(scores.by_name["g"]) == [None, 7.0]


def test_infinity_is_a_failure_of_its_sample(scorer, group):
    (scores,) = score(scorer(f=echo), group([1.0, math.inf, -math.inf]))
    assert values(scores.by_name["f"]) == [1.0, None, None]
    assert scores.valid.tolist() == [True, False, False]
    assert scores.num_failed == {"f": 2}
    assert scores.failures == {"f": "2 of 3 values are infinite"}


@pytest.mark.parametrize(
    "returned",
    [
        (1, 2.5),
        [True, np.float32(2.5)],
        np.array([1, 2.5], dtype=np.float32),
        np.array([2.5, 1.0])[::-1],
        np.array([1.0, 2.5], dtype=object),
        torch.tensor([1.0, 2.5], requires_grad=True),
        torch.tensor([1.0, 2.5], dtype=torch.bfloat16),
    ],
    ids=lambda returned: type(returned).__name__,
)
def test_what_a_reward_may_return(returned, scorer, group):
    (scores,) = score(scorer(f=returning(returned)), group([0, 0]))
    assert scores.by_name["f"].tolist() == [1.0, 2.5]
    assert not scores.by_name["f"].requires_grad


def test_what_a_reward_is_given(scorer, group):
    calls = []

    def spy(prompts, outputs, **columns):
        calls.append((prompts, outputs, columns))
        return [0.0] * len(outputs)

    score(scorer(f=spy), group(["a", "b"], text="draw", answer=3, box=[1, 2]))
    columns = {"answer": [3, 3], "box": [[1, 2], [1, 2]]}
    assert calls == [(["draw", "draw"], ["a", "b"], columns)]


def test_no_rewards_and_no_groups(scorer, group):
    assert scorer(f=echo).collect() == []
    (scores,) = score(scorer(), group([1.0]))
    assert scores.combined.tolist() == [0.0]


# --- failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("no luck"), SystemExit("no luck")])
def test_raising_invalidates_the_group_only(error, scorer, group):
    def fussy(prompts, outputs, **columns):
        if outputs[0] == "bad":
            raise error
        return [1.0] * len(outputs)

    each = scorer(f=(fussy, {"timeout_s": 5}), g=returning([5.0, 5.0]))
    bad, good = score(each, group(["bad", ""]), group(["", ""]))
    assert values(bad.by_name["f"]) == [None, None]
    assert bad.by_name["g"].tolist() == [5.0, 5.0]
    assert bad.valid.tolist() == [False, False]
    assert bad.combined.tolist() == [0.0, 0.0]
    assert bad.num_failed == {"f": 2, "g": 0}
    assert bad.failures == {"f": f"{type(error).__name__}: no luck"}
    assert good.combined.tolist() == [6.0, 6.0]
    assert good.failures == {}


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "reward 'f' returned 1 values for 2 samples"),
        ([1.0, 2.0, 3.0], "reward 'f' returned 3 values for 2 samples"),
        (torch.ones(2, 1), r"reward 'f' returned shape \[2, 1\], not \[2\]"),
        (3.0, r"reward 'f' returned shape \[\], not \[2\]"),
        (["1", "2"], "reward 'f' returned list, not 2 numbers"),
        ({"a": 1.0, "b": 2.0}, "reward 'f' returned dict, not 2 numbers"),
        (None, "reward 'f' returned NoneType, not 2 numbers"),
        (torch.ones(2, dtype=torch.complex64), "reward 'f' returned complex"),
    ],
)
def test_returning_the_wrong_thing_is_an_error(returned, message, scorer, group):
    # Also when it only logs: it is a mistake in the code, not bad luck.
    broken = scorer(f=(returning(returned), {"weight": 0.0}), g=echo)
    with pytest.raises(UserError, match=message):
        score(broken, group([1.0, 2.0]))


def test_failing_on_everything_is_said_for_each_group(scorer, group):
    def broken(prompts, outputs, **columns):
        raise KeyError(outputs[0])

    each = scorer(f=broken, g=echo)
    results = score(each, group([1.0, 2.0]), group([3.0, 4.0]))
    assert [r.failures["f"] for r in results] == ["KeyError: 1.0", "KeyError: 3.0"]
    assert [r.num_failed for r in results] == [{"f": 2, "g": 0}] * 2
    assert not any(r.valid.any() for r in results)
    assert each.collect() == []


def test_failing_on_everything_is_tolerated_when_only_logged(scorer, group):
    def broken(prompts, outputs, **columns):
        raise KeyError("gone")

    (scores,) = score(scorer(f=(broken, {"weight": 0.0}), g=echo), group([1.0, 2.0]))
    assert scores.combined.tolist() == [1.0, 2.0]
    assert scores.num_failed == {"f": 2, "g": 0}


def test_a_hang_times_out_and_later_groups_are_scored(scorer, group):
    release = threading.Event()

    def moody(prompts, outputs, **columns):
        if outputs[0] == "hang":
            release.wait()
        return [1.0] * len(outputs)

    each = scorer(f=(moody, {"timeout_s": TIMEOUT}))
    before, hung, after = score(each, group([0, 0]), group(["hang", 0]), group([0, 0]))
    assert hung.valid.tolist() == [False, False]
    assert hung.failures == {"f": f"timed out after {TIMEOUT:g} s"}
    assert hung.num_failed == {"f": 2}
    assert before.combined.tolist() == after.combined.tolist() == [1.0, 1.0]
    release.set()
    (again,) = score(each, group([0, 0]))
    assert again.valid.tolist() == [True, True]


def test_waiting_in_the_queue_does_not_count_as_hanging(scorer, group):
    def slow(prompts, outputs, **columns):
        threading.Event().wait(TIMEOUT / 2)
        return [1.0] * len(outputs)

    results = score(scorer(f=(slow, {"timeout_s": TIMEOUT})), *[group([0]) for _ in range(3)])
    assert all(result.valid.all() for result in results)


def test_hanging_on_everything_is_said(scorer, group):
    release = threading.Event()

    def stuck(prompts, outputs, **columns):
        release.wait()

    (result,) = score(scorer(f=(stuck, {"timeout_s": 0.05})), group([0]))
    release.set()
    assert result.failures == {"f": f"{TIMED_OUT} 0.05 s"}


# --- threads ------------------------------------------------------------------------------------


def test_submit_returns_while_the_reward_runs(scorer, group):
    started, release = threading.Event(), threading.Event()

    def patient(prompts, outputs, **columns):
        started.set()
        assert release.wait(10)
        return [1.0] * len(outputs)

    each = scorer(f=patient)
    each.submit(group([0]))
    assert started.wait(10)  # it runs before anybody collects
    each.submit(group([0]))
    release.set()  # reached only because submit did not wait
    assert [scores.combined.tolist() for scores in each.collect()] == [[1.0], [1.0]]


def test_rewards_run_beside_each_other(scorer, group):
    meeting = threading.Barrier(2, timeout=10)

    def meet(prompts, outputs, **columns):
        meeting.wait()
        return [1.0] * len(outputs)

    (scores,) = score(scorer(f=meet, g=meet), group([0]))
    assert scores.combined.tolist() == [2.0]


def test_one_call_of_a_reward_at_a_time(scorer, group):
    alone = threading.Lock()

    def exclusive(prompts, outputs, **columns):
        assert alone.acquire(blocking=False), "two calls at a time"
        threading.Event().wait(0.005)
        alone.release()
        return [1.0] * len(outputs)

    results = score(scorer(f=exclusive), *[group([0]) for _ in range(10)])
    assert all(result.valid.all() for result in results)


def test_closing_drops_the_queue(scorer, group):
    started, release, calls = threading.Event(), threading.Event(), []

    def patient(prompts, outputs, **columns):
        calls.append(outputs)
        started.set()
        release.wait(10)
        return [1.0] * len(outputs)

    with scorer(f=patient) as each:
        each.submit(group([1]))
        each.submit(group([2]))
        assert started.wait(10)
    release.set()
    first, second = each.collect()
    assert calls == [[1]]
    assert first.valid.all()
    assert second.failures == {"f": "the scorer was closed"}


def test_a_hung_reward_does_not_keep_the_interpreter_alive(tmp_path):
    (tmp_path / "hung_reward.py").write_text(
        "import threading\ndef hang(prompts, outputs, **columns):\n    threading.Event().wait()\n"
    )
    (tmp_path / "main.py").write_text(
        "import torch\n"
        "from mmrl.types import Prompt, RolloutGroup, RolloutRequest\n"
        "from rewards.combine import Scorer, parse_specs\n"
        "prompt = Prompt(id='p', text='p')\n"
        "request = RolloutRequest(prompt=prompt, group_size=1, seed=0, stream=0, index=0)\n"
        "mask = torch.ones(1, 1, dtype=torch.bool)\n"
        "scorer = Scorer(parse_specs([{'name': 'hung_reward.hang'}]))\n"
        "scorer.submit(RolloutGroup(request=request, outputs=[0], payload=None, mask=mask))\n"
        "print('left')\n"
    )
    paths = [str(tmp_path), *[path for path in sys.path if path]]
    done = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")],
        env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
