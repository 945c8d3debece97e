"""Rewards that compare a completion with a column, or look at its form alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from test_reward_ocr import edit_distance as distance

from mmrl.errors import UserError
from mmrl.schema import validate
from rewards import box_iou, edit_distance, exact_match, format_tags, length
from rewards.combine import Scorer, parse_specs, scored


def score(module, text, right=None, **config):
    """Of one completion."""
    reward = module.build(validate(module.Config, config, "rewards[0]"))
    columns = {} if right is None else {config.get("target", "answer"): [right]}
    return reward(["p"], [text], **columns).item()


@pytest.mark.parametrize(
    ("config", "text", "target", "expected"),
    [
        ({}, "Paris ", "paris", 1), ({}, "a  b\nc", "a b c", 1), ({}, "Rome", "Paris", 0),
        ({"ignore_case": False}, "Paris", "paris", 0), ({"where": "tag"}, "paris", "paris", 0),
        ({"where": "tag"}, "so <answer>paris</answer>", "paris", 1), ({}, "7", 7, 1),
        ({"where": "tag", "tag": "a"}, "<a>paris</a>", "paris", 1),
        ({"target": "solution"}, "x", "x", 1), ({"where": "boxed"}, r"\boxed{x}", "x", 1),
        ({"mode": "numeric"}, "1,000.0", "1000", 1), ({"mode": "numeric"}, "0.5", "1/2", 1),
        ({"mode": "numeric"}, "many", "1000", 0), ({"mode": "numeric"}, "999", "1000", 0),
        ({"mode": "numeric", "tolerance": 0.01}, "1009", 1000, 1),
        ({"mode": "numeric", "tolerance": 0.01}, "1011", 1000, 0),
        ({"mode": "numeric", "where": "number"}, "it makes 72.", "9 * 8\n#### 72", 1),
        ({"mode": "choice"}, "(b)", "B", 1), ({"mode": "choice"}, "B. cat", 1, 1),
        ({"mode": "choice"}, "C", "B", 0), ({"mode": "choice"}, "cat", "B", 0),
    ],
)  # fmt: skip
def test_exact_match(config, text, target, expected):
    assert score(exact_match, text, target, **config) == expected


@pytest.mark.parametrize(
    ("module", "config", "target"),
    [
        (exact_match, {}, None), (exact_match, {}, ""), (edit_distance, {}, None),
        (exact_match, {"mode": "numeric"}, "many"), (exact_match, {"mode": "choice"}, 99),
        (exact_match, {"mode": "choice"}, "a cat"), (box_iou, {}, None), (box_iou, {}, "no box"),
        (box_iou, {}, [1, 2, 3]),
    ],
)  # fmt: skip
def test_no_target_is_no_zero(module, config, target):
    assert math.isnan(score(module, "text", target, **config))


def test_a_sample_without_target_leaves_the_others_alone():
    reward = exact_match.build(exact_match.Config())
    found = reward(["p"] * 3, ["a", "a", "b"], answer=["a", None, "a"]).tolist()
    assert found[0] == 1
    assert math.isnan(found[1])
    assert found[2] == 0


@pytest.mark.parametrize("seed", range(20))
def test_edit_distance(seed):
    rng = random.Random(seed)
    text, target = ("".join(rng.choices("abc", k=rng.randint(1, 9))) for _ in range(2))
    expected = 1 - distance(text, target) / max(len(text), len(target))
    assert score(edit_distance, text, target) == pytest.approx(expected)


def test_edit_distance_of_an_answer():
    assert score(edit_distance, "KITTEN", "kitten") == 0
    assert score(edit_distance, "KITTEN", "kitten", ignore_case=True) == 1
    assert score(edit_distance, "kitten", "kitten", where="tag") == 0


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        ("<think>a\nb</think><answer>c</answer>", {}, 1),
        (" <think></think>\n\n<answer>c</answer>\n", {}, 1),
        ("<think>a</think> so <answer>c</answer>", {}, 0),
        ("<think>a</think><answer>c</answer> bye", {}, 0),
        ("<think>a</think><answer>c", {}, 0),
        ("<answer>c</answer><think>a</think>", {}, 0),
        ("<think>a<think>b</think><answer>c</answer>", {}, 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", {}, 0),
        ("<think>a < b</think><answer>c</answer>", {}, 1),
        ("a</think><answer>c</answer>", {"opened": True}, 1),
        ("<think>a</think><answer>c</answer>", {"opened": True}, 0),
        ("<thinking>a</thinking><answer>c</answer>", {"tags": ["thinking", "answer"]}, 1),
        ("<answer>c</answer>", {"tags": ["answer"]}, 1),
        ("<think>" * 5000, {}, 0),
    ],
)
def test_format_tags(text, config, expected):
    assert score(format_tags, text, **config) == expected


A, B, C, D = 10, 20, 40, 80


@pytest.mark.parametrize("unit", ["words", "characters"])
@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, 0), (A, 0), (15, 0.5), (B, 1), (30, 1), (C, 1), (60, 0.5), (D, 0), (90, 0)],
)
def test_length_is_a_trapezoid(unit, count, expected):
    text = " ".join("w" * count) if unit == "words" else "c" * count
    assert score(length, text, a=A, b=B, c=C, d=D, unit=unit) == expected


def test_length_in_tokens(group):
    """As they were sampled, whatever text they make."""
    counts = [A, 15, B, 60, D]
    mask = torch.arange(D) < torch.tensor(counts)[:, None]
    rolled = replace(group(["a b c"] * len(counts)), mask=mask, everything=mask)
    reward = length.build(length.Config(a=A, b=B, c=C, d=D, unit="tokens"))
    assert scored(reward, rolled, "length").values.tolist() == [0, 0.5, 1, 0.5, 0]
    with pytest.raises(TypeError, match="counts tokens, which only the rollout knows"):
        reward(["p"], ["a"])
    with pytest.raises(UserError, match="inside: 'think' with unit 'tokens'"):
        validate(length.Config, {"unit": "tokens", "inside": "think"}, "rewards[0]")


def test_tasks_may_want_lengths_of_their_own(group):
    """Long reasoning for mathematics, short answers for reading; other tasks any length."""
    lengths = {"math": {"a": 0, "b": 4, "c": 8, "d": 9}, "ocr": {"a": 0, "b": 1, "c": 2, "d": 4}}
    specs = parse_specs(
        [
            {"name": "length", "label": f"length_{task}", "tasks": [task], **limits}
            for task, limits in lengths.items()
        ]
        + [{"name": "exact_match"}]
    )
    texts = ["w", "w w", "w w w", "w w w w"]
    with Scorer(specs) as scorer:
        for index, task in enumerate(("math", "ocr", "chart")):
            scorer.submit(group(texts, index=index, task=task, answer="w"))
        found = scorer.collect()
    assert [scores.combined.tolist() for scores in found] == [
        [1.25, 0.5, 0.75, 1],
        [2, 1, 0.5, 0],
        [1, 0, 0, 0],
    ]
    assert all(bool(scores.valid.all()) for scores in found)


def test_length_inside_a_tag():
    options = {"a": -1, "b": 0, "c": 2, "d": 4, "inside": "think"}
    assert score(length, "<think>a b c</think> d e f", **options) == 0.5
    assert score(length, "<think></think> d e f", **options) == 1
    assert score(length, "d e f", **options) == 0


@pytest.mark.parametrize(
    ("text", "target", "config", "expected"),
    [
        ("[0, 0, 2, 2]", [0, 0, 2, 2], {}, 1),
        ('```json\n[{"bbox_2d": [1, 0, 3, 2]}]\n```', [0, 0, 2, 2], {}, 1 / 3),
        ("[0, 0, 2.0, 2]", "[[0, 0, 2, 2]]", {}, 1),
        ("[1, 1, 2, 2]", [1, 1, 3, 3], {"form": "xywh"}, 4 / 9),
        ("[5, 5, 6, 6]", [0, 0, 2, 2], {}, 0),
        ("[2, 0, 0, 2]", [0, 0, 2, 2], {}, 0),
        ("[0, 0, 1e999, 2]", [0, 0, 2, 2], {}, 0),
        ("[0, 0, 1e-200, 1e-200]", [0, 0, 1e-200, 1e-200], {}, 0),
        ("no box", [0, 0, 2, 2], {}, 0),
        ("[0, 0, 2, 2], [7, 7, 9, 9]", [[7, 7, 9, 9], [0, 0, 2, 2]], {}, 1),
        ("[0, 0, 2, 2]", [[7, 7, 9, 9], [0, 0, 2, 2]], {}, 0.5),
        ("[0, 0, 2, 2] [0, 0, 2, 2] [0, 0, 2, 2]", [0, 0, 2, 2], {}, 1 / 3),
        ("[0, 0, 9, 9] <answer>[0, 0, 2, 2]</answer>", [0, 0, 2, 2], {"where": "tag"}, 1),
    ],
)
def test_box_iou(text, target, config, expected):
    assert score(box_iou, text, target, **config) == pytest.approx(expected)


@pytest.mark.parametrize("module", [exact_match, edit_distance, format_tags, length, box_iou])
def test_refuses_what_is_no_text(module):
    with pytest.raises(TypeError, match="reads text, not bytes"):
        module.build(module.Config())(["p"], [b"image"], answer=["a"])


@pytest.mark.parametrize(
    ("module", "config", "message"),
    [
        (exact_match, {"mode": "number"}, r"rewards\[0\]\.mode: .*'numeric'.*got 'number'"),
        (exact_match, {"were": "tag"}, r"rewards\[0\]\.were: .*did you mean 'where'"),
        (exact_match, {"tolerance": -1}, r"tolerance: .*greater than or equal to 0"),
        (exact_match, {"tag": "<a>"}, r"rewards\[0\]\.tag: .*got '<a>'"),
        (format_tags, {"tags": []}, "at least 1"),
        (format_tags, {"tags": ["a|b"]}, r"rewards\[0\]\.tags\[0\]: .*got 'a\|b'"),
        (length, {"b": 700}, "a, b, c, d = 0, 700, 300, 600 are not in order; allowed: a < b"),
        (box_iou, {"form": "yxyx"}, r"'xyxy' or 'xywh'.*got 'yxyx'"),
    ],
)
def test_mistakes(module, config, message):
    with pytest.raises(UserError, match=message):
        validate(module.Config, config, "rewards[0]")
