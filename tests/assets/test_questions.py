"""Questions of the tiny language models: right answers, traces that lead there, and slips."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from assets import picture_tasks, shapes, text_tasks
from assets.cold_start import Demonstration, alike, demonstrations, padded, prompt_sets
from rewards._shapes import view

TEXT, PICTURES = list(text_tasks.SHARES), list(picture_tasks.SHARES)


def some(tasks, task, count=60, *, slip=False):
    if task in text_tasks.GYM:
        pytest.importorskip("reasoning_gym")
    rng = random.Random(0)
    return [tasks.make(task, rng, slip=slip) for _ in range(count)]


@pytest.mark.parametrize("task", text_tasks.ARITHMETIC)
def test_arithmetic_is_right(task):
    for item in some(text_tasks, task, 300):
        expression = item.prompt.removesuffix(" = ?")
        assert re.fullmatch(r"\d+ [-+*] \d+", expression)
        assert item.answer == str(eval(expression))


@pytest.mark.parametrize("task", TEXT)
def test_every_step_of_a_right_trace_is_true(task):
    for item in some(text_tasks, task):
        for step in item.steps:
            left, sign, right = re.fullmatch(r"(.+?)([=<>])(.*)", step).groups()
            if sign == "=" and task != "compare":
                assert eval(left) == int(right), item
            elif task != "sort":
                assert eval(f"{left}{sign.replace('=', '==')}{right}"), item


def test_order():
    for item in some(text_tasks, "sort"):
        given = [int(word) for word in item.prompt.split()[1:]]
        assert [int(word) for word in item.answer.split()] == sorted(given)
    for item in some(text_tasks, "compare"):
        assert item.answer == str(max(map(int, re.findall(r"\d+", item.prompt))))


@pytest.mark.parametrize("task", list(text_tasks.GYM))
def test_gym_tasks_are_judged_by_their_own_verifier(task):
    gym = pytest.importorskip("reasoning_gym")
    score = gym.get_score_answer_fn(task)
    for item in some(text_tasks, task, 20):
        row = item.row
        assert row["source_dataset"] == task
        assert score(item.answer, row | {"question": item.prompt}) == 1


@pytest.mark.parametrize(
    ("tasks", "task"),
    [*((text_tasks, t) for t in TEXT), *((picture_tasks, t) for t in PICTURES)],
)
def test_a_slip_leads_to_a_wrong_answer_in_the_same_form(tasks, task):
    right, wrong = some(tasks, task), some(tasks, task, slip=True)
    form = re.compile(r"<think>[^<]*(?:<[^/a][^<]*)*</think><answer>[^<>]+</answer>")
    assert all(form.fullmatch(item.completion) for item in [*right, *wrong])
    assert all(item.right(item.answer) for item in right)
    if task in text_tasks.ARITHMETIC:
        answers = [(item, str(eval(item.prompt.removesuffix(" = ?")))) for item in wrong]
        assert all(item.answer != answer for item, answer in answers)


def test_descriptions_name_everything():
    for item in some(picture_tasks, "describe"):
        found = {cell_at(*middle(blob.box)): f"{blob.colour} {blob.shape}" for blob in seen(item)}
        steps = tuple(f"{cell} {found.get(cell, 'nothing')}" for cell in picture_tasks.CELLS)
        assert item.steps == steps
        assert item.answer == str(len(found))


def test_boxes_hold_the_ink_of_their_shape():
    for item in some(picture_tasks, "box"):
        left, top, right, bottom = map(int, re.findall(r"\d+", item.answer))
        inside = item.image[top:bottom, left:right].reshape(-1, 3).astype(int)
        paper = item.image[0, 0].astype(int)
        inked = (np.abs(inside - paper).sum(1) > 60).mean()
        assert inked > 0.4, item.prompt
        assert item.right(item.answer)
        assert not item.right("[0,0,3,3]")
        assert not item.right(None)


def seen(item) -> list:
    """Objects of the picture, found by classical vision."""
    return view(item.image).blobs


def middle(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def cell_at(x, y) -> str:
    """Of a place in fractions of the height, which is that of two cells."""
    return picture_tasks.CELLS[int(2 * y) * 4 + int(2 * x)]


def test_counts_and_comparisons_are_those_of_the_picture():
    for item in some(picture_tasks, "count"):
        shape = item.prompt.split()[2].removesuffix("s")
        number = sum(blob.shape == shape for blob in seen(item))
        assert (item.answer, item.steps) == (str(number), (shape,) * number)
    for item in some(picture_tasks, "compare"):
        found = [blob.shape for blob in seen(item)]
        assert item.answer == f"{max(set(found), key=found.count)}s"


def test_colours_and_places_are_those_of_the_picture():
    for item in some(picture_tasks, "colour"):
        shape = item.prompt.split()[-1].removesuffix("?")
        (blob,) = (blob for blob in seen(item) if blob.shape == shape)
        assert blob.colour == item.answer
        assert item.steps == (f"{shape} {cell_at(*middle(blob.box))} {blob.colour}",)
    for item in some(picture_tasks, "position"):
        first, *_, second = re.findall("|".join(shapes.SHAPES), item.prompt)
        at = {blob.shape: middle(blob.box) for blob in seen(item)}
        (x, y), (x2, y2) = at[first], at[second]
        across, down = x - x2, y - y2
        if abs(across) > abs(down):
            assert item.answer == ("left" if across < 0 else "right")
        else:
            assert item.answer == ("above" if down < 0 else "below")


def test_sets_and_demonstrations_do_not_meet():
    sets = prompt_sets(text_tasks.make, ["add", "sort"], 0, {"eval": 20, "train": 30})
    keys = {name: {item.key for item in items} for name, items in sets.items()}
    assert len(keys["eval"]) == 40
    assert len(keys["train"]) == 60
    assert not keys["eval"] & keys["train"]
    held = {str(i) for i in range(5)}

    def make(task, rng, slip=False):
        return text_tasks.Item(task=task, prompt=str(rng.randrange(10)), steps=(), answer="")

    stream = demonstrations(make, {"add": 1}, 0.0, 0, held)
    assert {next(stream).prompt for _ in range(200)} == {str(i) for i in range(5, 10)}


def test_batches_are_alike_and_only_completions_are_learned():
    rng = random.Random(0)
    rows = [Demonstration([1] * rng.randint(1, 30), [2, 3]) for _ in range(160)]
    batches = alike(iter(rows), 10, random.Random(0))
    seen = [next(batches) for _ in range(8)]
    spreads = [max(r.length for r in b) - min(r.length for r in b) for b in seen]
    assert max(spreads) < 15
    batch = padded([Demonstration([5, 6], [7]), Demonstration([5], [8, 9, 4])], pad=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [5, 8, 9, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 8, 9, 4]]
