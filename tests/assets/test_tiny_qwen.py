"""The shipped tiny language models: checksums, size, classes, tokens, prompts, accuracy."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from assets import picture_tasks, text_tasks
from assets.cold_start import answer_of

ASSETS = Path(__file__).resolve().parents[2] / "assets"
NAMES = ("tiny-qwen", "tiny-qwen-vl")
EVERY = pytest.mark.parametrize("name", NAMES)


def manifest(name: str) -> dict:
    return json.loads((ASSETS / name / "manifest.json").read_text(encoding="utf-8"))


def rows(name: str) -> list[dict]:
    """Rows of one prompt file."""
    path = ASSETS / "prompts" / name
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@EVERY
def test_manifest_lists_every_file_with_its_checksum(name):
    files = manifest(name)["files"]
    for file, entry in files.items():
        data = (ASSETS / name / file).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], file
        assert len(data) == entry["bytes"], file
    assert {p.name for p in (ASSETS / name).iterdir()} == {*files, "manifest.json"}
    assert sum(entry["bytes"] for entry in files.values()) <= 8 * 2**20


@EVERY
def test_accuracy_lies_in_the_band(name):
    accuracy = manifest(name)["accuracy"]
    assert accuracy["questions"] >= 200
    assert 0.25 <= accuracy["overall"] <= 0.65
    assert manifest(name)["time"]["cpu_seconds"] <= 45 * 60


@EVERY
def test_it_is_what_its_name_says(name):
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    config = AutoConfig.from_pretrained(ASSETS / name)
    assert config.model_type == {"tiny-qwen": "qwen3", "tiny-qwen-vl": "qwen3_vl"}[name]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    assert type(AutoProcessor.from_pretrained(ASSETS / name)).__name__ in (
        "Qwen2Tokenizer",
        "Qwen3VLProcessor",
    )
    text = "<think>3+4=7 Grüße 漢字</think><answer>17</answer>"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("<answer>17</answer>") == ["<answer>", "1", "7", "</answer>"]
    assert max(ids) < config.get_text_config().vocab_size


@pytest.mark.parametrize("kind", ["text", "arithmetic"])
def test_text_prompts(kind):
    train, held = rows(f"{kind}-train.jsonl"), rows(f"{kind}-eval.jsonl")
    tasks = text_tasks.ARITHMETIC if kind == "arithmetic" else tuple(text_tasks.SHARES)
    assert {row["task"] for row in train} == {row["task"] for row in held} == set(tasks)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    for row in [*train, *held]:
        if row["task"] in text_tasks.ARITHMETIC:
            assert str(eval(row["prompt"].removesuffix(" = ?"))) == row["answer"]


def test_picture_prompts():
    train, held = rows("pictures-train.parquet"), rows("pictures-eval.parquet")
    assert {row["task"] for row in train} == set(picture_tasks.ASKED)
    keys = [{(r["prompt"], r["images"][0]["bytes"]) for r in each} for each in (train, held)]
    assert not keys[0] & keys[1]
    for row in held[::20]:
        assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (64, 32)


def test_the_answer_stands_between_the_tags():
    assert answer_of("<think>1</think><answer> 7 </answer>") == "7"
    assert answer_of("<answer>7") is None
