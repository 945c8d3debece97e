"""Prompts of the preference task: as shipped, and apart from those of the other tasks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts"
task = pytest.importorskip("assets.preference_task", reason="the prompts' script needs rapidocr")


def rows(name: str) -> list[dict]:
    """The lines of one prompt file."""
    text = (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def contents(found: list[dict]) -> set:
    """What is asked for: the prompt of a sign, and of a scene what all its wordings share."""
    return {task.content_of(row) if "objects" in row else row["prompt"] for row in found}


@pytest.fixture(scope="module")
def split():
    return task.split(0)


def test_the_shipped_files_are_what_the_script_writes(split, tmp_path, monkeypatch):
    assert (rows("preference-train"), rows("preference-eval")) == split
    monkeypatch.setattr("sys.argv", ["preference_task.py", "--out", str(tmp_path)])
    task.main()
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (PROMPTS / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_half_are_signs_and_half_scenes(split):
    for found, size in zip(split, (task.NUM_TRAIN, task.NUM_EVAL), strict=True):
        sorts = Counter(row.get("tag", "sign") for row in found)
        assert sorts == {"sign": size // 2, "counting": size // 4, "position": size // 4}


def test_nothing_is_asked_for_twice(split):
    train, held = map(contents, split)
    assert (len(train), len(held)) == (task.NUM_TRAIN, task.NUM_EVAL)
    assert not train & held


@pytest.mark.parametrize("other", ["ocr", "composition"])
def test_no_other_task_asks_for_the_same(split, other):
    ours = contents(split[0]) | contents(split[1])
    assert not ours & contents(rows(f"{other}-eval"))
    assert not ours & contents(rows(f"{other}-train"))


def test_all_are_prompts_of_pre_training(split):
    signs, _, _ = task.ocr_task.split_prompts(0)
    known = [*signs, *task.composition_task.split(0).pretraining]
    assert all(row in known for row in [*split[0], *split[1]])


def test_another_seed_draws_other_prompts(split):
    assert contents(task.split(1)[0]) != contents(split[0])
