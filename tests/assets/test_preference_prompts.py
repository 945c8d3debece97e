"""Prompts of the preference task: as shipped, open, and apart from those of the other tasks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from assets import shapes

ASSETS = Path(__file__).resolve().parents[2] / "assets"
task = pytest.importorskip("assets.preference_task", reason="the prompts' script needs rapidocr")


def rows(name: str) -> list[dict]:
    """The lines of one prompt file."""
    text = (ASSETS / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompts(found: list[dict]) -> list[str]:
    return [row["prompt"] for row in found]


@pytest.fixture(scope="module")
def split():
    return task.split(0)


def test_the_shipped_files_are_what_the_script_writes(split, tmp_path, monkeypatch):
    assert (rows("preference-train"), rows("preference-eval")) == split
    monkeypatch.setattr("sys.argv", ["preference_task.py", "--out", str(tmp_path)])
    task.main()
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (ASSETS / "prompts" / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_is_asked_for_twice(split):
    train, held = map(prompts, split)
    assert len(held) == task.NUM_EVAL
    assert len({*train, *held}) == len(train) + len(held) == 104 + 3 + 18 + 6 * 37


def test_both_sets_have_signs_and_scenes(split):
    for found in split:
        kinds = [row["kind"] for row in found]
        assert 0.2 < kinds.count("sign") / len(kinds) < 0.4
        assert set(kinds) == {"sign", "scene"}


@pytest.mark.parametrize("other", ["ocr", "composition"])
@pytest.mark.parametrize("name", ["train", "eval"])
def test_prompts_are_open_where_those_of_other_tasks_never_are(split, other, name):
    ours, theirs = prompts([*split[0], *split[1]]), prompts(rows(f"{other}-{name}"))
    assert all(starts_like_the_others(prompt) for prompt in theirs)
    assert not any(starts_like_the_others(prompt) for prompt in ours)


def starts_like_the_others(prompt: str) -> bool:
    """Whether a sign is given a colour, or a scene a number of objects."""
    words = prompt.split()
    return words[0] in shapes.NUMERALS.values() and words[:2] != ["a", "sign"]


def test_texts_that_nothing_is_trained_on_are_not_asked_for(split):
    _, _, unseen = task.ocr_task.split_prompts(0)
    found = " ".join(prompts([*split[0], *split[1]]))
    assert unseen
    assert not any(f'"{text}"' in found for text in unseen)


def test_the_pipeline_knows_every_word(split):
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-sd3" / "tokenizer")
    for row in [*split[0], *split[1]]:
        tokens = tokenizer(row["prompt"]).input_ids
        outside = tokenizer(row["prompt"].split('"')[0]).input_ids
        assert len(tokens) <= tokenizer.model_max_length
        # One token for each word outside the quotes, between those of the start and the end.
        assert len(outside) - 2 == len(row["prompt"].split('"')[0].split())


def test_another_seed_draws_other_prompts(split):
    assert prompts(task.split(1)[1]) != prompts(split[1])
