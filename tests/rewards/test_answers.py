"""Finding answers in completions, and reading numbers and options from them."""

from __future__ import annotations

import time

import pytest

from rewards import exact_match
from rewards._answers import AnswerConfig, choice, code_in, extract, is_missing, number, target_text


@pytest.mark.parametrize(
    ("where", "text", "answer"),
    [
        ("text", "  all of it\n", "all of it"),
        ("tag", "<answer>1</answer> no: <answer> 2\n</answer> so", "2"),
        ("tag", "<answer>1</answer><answer>2", "1"),
        ("tag", "</answer> 1 <answer>", None),
        ("tag", "nothing", None),
        ("boxed", r"\boxed{1} and \boxed{ \frac{a}{b} }.", r"\frac{a}{b}"),
        ("boxed", r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        ("boxed", r"\boxed{1} then \boxed{2", None),
        ("boxed", "no box", None),
        ("number", "from 3 to -1,234.50 apples.", "-1,234.50"),
        ("number", "it is 3-2", "2"),
        ("number", "x=.5", ".5"),
        ("number", "about 1/3 of v2", "1/3"),
        ("number", "1.5e-3!", "1.5e-3"),
        ("number", "no number", None),
    ],
)
def test_the_last_place_counts(where, text, answer):
    assert extract(text, where) == answer


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        ("<answer>1,000</answer>", "1000"),
        ("<answer> 1e3 </answer>", "1000"),
        ("<answer>2/4</answer>", "0.5"),
        ("<answer>A  Red\nsquare</answer>", "a red square"),
        ("<answer></answer>", ""),
        ("1000", None),
    ],
)
def test_equal_answers_have_one_spelling(text, spelling):
    assert AnswerConfig(where="tag").canonical(text) == spelling
    assert exact_match.Config(where="tag").canonical(text) == spelling


def test_the_spelling_of_an_option_is_its_letter():
    config = exact_match.Config(mode="choice", where="tag")
    texts = ["<answer>(b)</answer>", "<answer>B. a cat</answer>", "<answer>a cat</answer>", "B"]
    assert [config.canonical(text) for text in texts] == ["B", "B", None, None]
    with pytest.raises(TypeError, match="reads text, not int"):
        config.canonical(3)


def test_tags_have_names():
    assert extract("<a>1</a><b>2</b>", "tag", "a") == "1"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12), ("-1,234.5", -1234.5), ("$1{,}000", 1000), ("1e3", 1000), (" 50\\% ", 50),
        ("1/4", 0.25), (r"\frac{3}{4}", 0.75), (r"-\dfrac{1}{2}", -0.5), ("+.5", 0.5),
        ("1/0", None), ("nan", None), ("1e999", None), ("12 apples", None), ("", None),
    ],
)  # fmt: skip
def test_numbers(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), (" b ", "B"), ("(c)", "C"), ("D. a cat", "D"), ("E) yes", "E"), ("A:", "A"),
        ("The answer is B because A is wrong.", "B"), ("I choose option **C**", "C"),
        ("first (A), but no: (B) it is, I think", "B"), ("so it must be D.", "D"),
        (r"\text{B}", "B"), ("A cat", None), ("the answer is a cat", None), ("", None),
    ],
)  # fmt: skip
def test_options(text, letter):
    assert choice(text) == letter


def test_targets():
    assert target_text("3 + 4 = 7\n#### 7") == "7"
    assert target_text(7) == "7"
    assert all(map(is_missing, (None, "", "  ", float("nan"), [], {})))
    assert not any(map(is_missing, (0, 0.0, False, "0", [0])))


def test_code():
    assert code_in("x = 1") == "x = 1"
    text = "First:\n```python\nx = 1\n```\nbetter:\n```\nx = 2\n```\nbye"
    assert code_in(text).strip() == "x = 2"
    assert code_in("```python\nx = 1\n```\n```python\nx = ").strip() == "x = 1"


@pytest.mark.parametrize(
    "piece", ["<answer>", "\\boxed{", "1,", "(A) ", "```\n", "answer is ", "[1, ", " ", "9"]
)
def test_what_takes_long_to_read_is_read_quickly(piece):
    text = piece * 20_000
    start = time.perf_counter()
    for where in ("text", "tag", "boxed", "number"):
        extract(text, where)
    choice(text), number(text), code_in(text)
    assert time.perf_counter() - start < 2
