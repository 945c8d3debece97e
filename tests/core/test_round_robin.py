"""Tasks that take turns: order, coverage, resuming, and what is refused."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from core_oracles import task_prompts

from mmrl.errors import UserError
from mmrl.prompts import round_robin
from mmrl.types import Prompt

CONFIG = round_robin.Config()
PROMPTS = task_prompts(ocr=9, geneval=6, aesthetic=7)


def run(counts: list[int], state=None, seed: int = 0, prompts=PROMPTS):
    """Ids of the prompts of each step, and the state after them (through JSON, as when saved)."""
    state, steps = state or {}, []
    for step, count in enumerate(counts):
        chosen, state = round_robin.take(prompts, count, step, seed, CONFIG, state)
        steps.append([prompt.id for prompt in chosen])
        state = json.loads(json.dumps(state))
    return steps, state


def tasks(steps: list[list[str]]) -> list[str]:
    named = {prompt.id: prompt.columns["task"] for prompt in PROMPTS}
    return [named[i] for step in steps for i in step]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_over_3n_slots_each_task_comes_n_times(count):
    steps, state = run([count] * 3 * 4)
    assert Counter(tasks(steps)) == dict.fromkeys(("ocr", "geneval", "aesthetic"), 4 * count)
    assert tasks(steps)[:4] == ["aesthetic", "geneval", "ocr", "aesthetic"]
    assert state["slot"] == 12 * count


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped():
    counts = [4, 4, 5, 1, 7, 4, 4, 4]
    whole, end = run(counts)
    for stop in range(len(counts)):
        first, state = run(counts[:stop])
        second, last = run(counts[stop:], state)
        assert first + second == whole
        assert last == end


def test_seeds_differ_and_repeat():
    assert run([6] * 4) == run([6] * 4)
    assert run([6] * 4)[0] != run([6] * 4, seed=1)[0]


def test_prompts_of_a_step_differ_and_all_come_about_equally_often():
    steps, _ = run([17] * 60)  # up to 6 of a task: geneval's 6 prompts all at once
    assert all(len(set(step)) == 17 for step in steps)
    times = Counter(i for step in steps for i in step)
    for prompt in PROMPTS:
        size = sum(p.columns["task"] == prompt.columns["task"] for p in PROMPTS)
        # 340 draws of each task; what a shuffle leaves over is random, 10 % of deviation at most.
        assert 0.65 < times[prompt.id] * size / 340 < 1.35


def test_neither_the_given_state_nor_the_order_of_the_file_decides_the_task():
    state = {"slot": 2, "cursors": {"ocr": [0, 3]}}
    round_robin.take(PROMPTS, 5, 0, 0, CONFIG, state)
    assert state == {"slot": 2, "cursors": {"ocr": [0, 3]}}
    assert tasks(run([6], prompts=PROMPTS[::-1])[0]) == tasks(run([6])[0])


def test_one_task_is_fine():
    only = task_prompts(ocr=4)
    steps, state = run([3, 3], prompts=only)
    assert [len(set(step)) for step in steps] == [3, 3]
    assert state["cursors"] == {"ocr": [1, 3]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, "'draw a cat' has no column 'task'"),
        ({"tasks": "ocr"}, "no column 'task'; did you mean 'tasks'"),
        ({"task": 3}, "needs the name of a task under 'task', got 3"),
        ({"task": ""}, "needs the name of a task"),
    ],
)
def test_prompts_without_a_task_are_refused(columns, message):
    prompts = [*PROMPTS, Prompt(id="x", text="draw a cat", columns=columns)]
    with pytest.raises(UserError, match=message):
        round_robin.take(prompts, 3, 0, 0, CONFIG, {})


def test_too_many_prompts_a_step_are_refused_at_the_first_step():
    """19 of 3 tasks is 7 of the one whose turn comes first, in time each of them."""
    with pytest.raises(UserError, match=r"prompts_per_step: 19 .* 'geneval' .* 18 or less"):
        run([19])
    run([18, 18, 18])


def test_the_column_has_a_name_of_its_own():
    prompts = [Prompt(id=p.id, text=p.text, columns={"kind": p.columns["task"]}) for p in PROMPTS]
    config = round_robin.Config(column="kind")
    chosen, _ = round_robin.take(prompts, 3, 0, 0, config, {})
    assert [p.columns["kind"] for p in chosen] == ["aesthetic", "geneval", "ocr"]
