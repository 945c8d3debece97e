"""Prompts from files of every kind, the hub and reasoning-gym."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrl.errors import UserError
from mmrl.prompts import _tables
from mmrl.prompts.dataset import content_id, load_prompts
from mmrl.resolve import optional
from mmrl.types import Prompt

datasets = pytest.importorskip("datasets")

ROWS = [
    {"prompt": "one and one", "answer": 2, "tags": ["sum"]},
    {"prompt": "two and two", "answer": 4, "tags": ["sum", "even"]},
]
VERL = {
    "data_source": "gsm8k",
    "prompt": [{"role": "user", "content": "9 * 8 ?"}],
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"index": 0, "split": "train"},
}
EASYR1 = {"problem": "<image>How many?", "answer": "3", "images": ["a.png"]}


def write(path: Path, rows) -> Path:
    """Rows as a file of the kind that its suffix says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        getattr(datasets.Dataset.from_list(rows), f"to_{path.suffix[1:]}")(path)
    return path


def load(path, **keys):
    return load_prompts(Path(path), "prompts.source", keys)


def test_ids_of_jsonl_prompts_never_change(tmp_path):
    """Noise follows from them: another id is another run."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a \u2028sign", "text": "47", "n": [1, {"b": 2.5, "a": null}]}\n')
    (prompt,) = load(path)
    assert prompt.id == "be3c568dbfc3513b"
    assert prompt.messages == ()


def test_prompts_know_their_rows(tmp_path):
    """Where they stand is said in messages, and no part of what they are."""
    lines = write(tmp_path / "a.jsonl", [ROWS[0], ROWS[0], ROWS[1]])
    assert [p.where for p in load(lines)] == [f"prompts.source: {lines}:{i}" for i in (1, 3)]
    table = write(tmp_path / "a.parquet", ROWS)
    assert load(table)[1].where == f"prompts.source: {table}: row 2"
    assert load(table)[1].named == f"prompts.source: {table}: row 2: prompt 'two and two'"
    (prompt, _) = load_prompts({"sums": table}, "prompts.source")
    assert prompt.where == f"prompts.source.sums: {table}: row 1"
    assert Prompt(id="", text="typed in").named == "prompt 'typed in'"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files_of_all_kinds_say_the_same(tmp_path, suffix):
    prompts = load(write(tmp_path / f"a{suffix}", ROWS))
    assert prompts == load(write(tmp_path / "b.jsonl", ROWS))
    assert prompts[1].columns == {"answer": 4, "tags": ["sum", "even"]}


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,answer\n"one, two",3\nfour,\n')
    assert [(p.text, p.columns) for p in load(path)] == [
        ("one, two", {"answer": 3}),
        ("four", {"answer": None}),
    ]


def test_lines_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    assert [p.text for p in load(path)] == ["x", "y"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_verl(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", [VERL])
    (prompt,) = load(path, answer="reward_model.ground_truth")
    assert prompt.text == "9 * 8 ?"
    assert prompt.messages == ({"role": "user", "content": "9 * 8 ?"},)
    kept = {key: value for key, value in VERL.items() if key != "prompt"}
    assert prompt.columns == {**kept, "answer": "72"}


def test_easyr1(tmp_path):
    (prompt,) = load(write(tmp_path / "a.parquet", [EASYR1]), prompt="problem", truth="answer")
    assert (prompt.text, prompt.columns) == (
        "<image>How many?",
        {"answer": "3", "truth": "3", "images": ["a.png"]},
    )


def test_conversations(tmp_path):
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes", "tool": "t"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "then"}]},
    ]
    (prompt,) = load(write(tmp_path / "a.jsonl", [{"prompt": talk, "answer": 1}]))
    assert prompt.text == "then"
    assert list(prompt.messages) == talk
    assert prompt.columns == {"answer": 1}
    (short,) = load(write(tmp_path / "b.jsonl", [{"prompt": talk[-1:], "answer": 1}]))
    assert short.text == prompt.text
    assert short.id != prompt.id


def test_tables_give_messages_no_empty_keys(tmp_path):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "n"}]
    rows = [{"prompt": [*talk, talk[0]]}]
    (table,) = load(write(tmp_path / "a.parquet", rows))
    (lines,) = load(write(tmp_path / "a.jsonl", rows))
    assert table == lines


def test_tasks_keep_messages(tmp_path):
    path = write(tmp_path / "a.jsonl", [VERL])
    (prompt,) = load_prompts({"t": path}, "prompts.source")
    assert prompt.messages
    assert prompt.task == "t"


def test_images_have_an_identity(tmp_path):
    first, second = (Image.new("RGB", (2, 2), colour) for colour in ("red", "blue"))
    same = content_id("p", {"image": first})
    assert same == content_id("p", {"image": first.copy()})
    assert same != content_id("p", {"image": second})
    assert same != content_id("p", {"image": first.resize((4, 1))})
    kinds = [b"x", np.zeros(2), np.zeros(2, dtype=np.int32), date(2026, 1, 1)]
    assert len({content_id("p", {"column": value}) for value in kinds}) == len(kinds)
    with pytest.raises(TypeError, match="object"):
        content_id("p", {"column": object()})


def test_images_of_a_parquet_file(tmp_path):
    images = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    rows = [{"prompt": "p", "image": Image.new("RGB", (2, 2), "red")}]
    datasets.Dataset.from_list(rows, features=images).to_parquet(tmp_path / "a.parquet")
    (prompt,) = load(tmp_path / "a.parquet")
    assert prompt.columns["image"].getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([EASYR1], {}, r"row 1: needs a non-empty string .*columns: problem, answer, images"),
        (
            [EASYR1],
            {"prompt": "problme"},
            r"row 1: no column 'problme' \(keys\.prompt\).*'problem'",
        ),
        ([VERL], {"a": "reward_model.truth"}, r"no column 'reward_model\.truth'.*ground_truth"),
        ([VERL], {"a": "data_source.x"}, r"no column 'data_source\.x'.*no 'x'"),
        ([*ROWS, {"prompt": "p", "answer": None}], {"a": "answer"}, r"row 3: the column 'answer'"),
        ([{"prompt": "p", "answer": " "}], {"a": "answer"}, r"\(keys\.a\) is empty"),
        ([{"prompt": [{"role": "user"}]}], {}, r"row 1: prompt\[0\] should be a message"),
        ([{"prompt": ["hello"]}], {}, r"prompt\[0\] should be a message.*'hello'"),
        ([{"prompt": [{"role": "system", "content": "s"}]}], {}, "needs a user's message"),
        ([{"prompt": []}], {}, r"needs a non-empty string"),
    ],
)
def test_mistakes_name_file_row_and_column(tmp_path, rows, keys, message):
    with pytest.raises(UserError, match=rf"prompts\.source.*bad\.json.*{message}"):
        load(write(tmp_path / "bad.json", rows), **keys)


def test_an_empty_list(tmp_path):
    with pytest.raises(UserError, match=r"prompts file is empty: .*none\.json"):
        load(write(tmp_path / "none.json", []))


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_broken_tables(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\x00nothing\n\x80" * 9)
    with pytest.raises(UserError, match=rf"prompts\.source: .*{name} cannot be read as"):
        load(tmp_path / name)


# --- the hub ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "train")),
        ("openai/gsm8k:main@test", ("openai/gsm8k", "main", "test")),
        ("a.b/c-1.5@train[:10%]", ("a.b/c-1.5", None, "train[:10%]")),
        ("squad@validation", ("squad", None, "validation")),
    ],
)
def test_hub_ids(monkeypatch, source, asked):
    def load_dataset(name, subset, split):
        assert (name, subset, split) == asked
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert [p.text for p in load(source)] == [row["prompt"] for row in ROWS]


def test_no_network_is_said(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub\nmany more lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = (
        r"'openai/gsm8k@test' is no file here, and .*: ConnectionError: Couldn't reach the Hub$"
    )
    with pytest.raises(UserError, match=message):
        load("openai/gsm8k@test")


@pytest.mark.parametrize(
    "path", ["none", "none.jsonl", "a/none.parquet", "mmrl/none", "a/b/c", "/a/b", "../a"]
)
def test_a_missing_file_is_not_sought_on_the_hub(path):
    assert not _tables.is_hub_id(Path(path))
    with pytest.raises(UserError, match="prompts file not found"):
        load(path)


# --- reasoning-gym ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gym():
    try:
        return optional("reasoning_gym", "mmrl[gym]", "test")
    except UserError:
        pytest.skip("reasoning-gym is not installed")


def test_a_task(gym):
    prompts = load("reasoning_gym:leg_counting?size=3&max_animals=2&min_animals=1")
    assert len(prompts) == 3
    assert prompts == load("reasoning_gym:leg_counting?size=3&seed=0&max_animals=2&min_animals=1")
    assert prompts != load("reasoning_gym:leg_counting?size=3&seed=1&max_animals=2&min_animals=1")
    assert set(prompts[0].columns) == {"answer", "metadata", "source_dataset"}
    assert prompts[0].columns["metadata"]["num_animals"] <= 2


def test_a_task_and_its_verifier(gym):
    from rewards import reasoning_gym

    reward = reasoning_gym.build(reasoning_gym.Config())
    (prompt,) = load("reasoning_gym:basic_arithmetic?size=1")
    columns = {name: [value] * 2 for name, value in prompt.columns.items()}
    found = reward([prompt.text] * 2, [prompt.columns["answer"], "?"], **columns).tolist()
    assert found[0] == 1
    assert found[1] < 0.1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("leg_countin", "unknown task of reasoning_gym 'leg_countin'; did you mean 'leg_counting'"),
        ("leg_counting?sice=3", "unknown option 'sice'; did you mean 'size'"),
        ("leg_counting?size", "options should read .name=value&name=value"),
        ("leg_counting?min_animals=0", "the task refuses .*'min_animals': 0"),
        ("leg_counting?size=many", "the task refuses .*'size': 'many'"),
    ],
)
def test_mistakes_in_a_task(gym, source, message):
    with pytest.raises(UserError, match=rf"^prompts\.source.*{message}"):
        load(f"reasoning_gym:{source}")


@pytest.mark.parametrize(
    ("task", "hint"), [("word_ladder", "PYTHONHASHSEED=0, or"), ("list_functions", "jsonl")]
)
def test_tasks_that_no_process_can_repeat(gym, monkeypatch, task, hint):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match=f"{task}.*other puzzles in every process.*{hint}"):
        load(f"reasoning_gym:{task}")


def test_a_fixed_hash_seed_makes_them_repeatable(gym, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert len(load("reasoning_gym:ransom_note?size=2")) == 2


# A template


def with_template(path, template, **keys):
    return load_prompts(path, "prompts.source", keys, template)


@pytest.mark.parametrize("as_file", [False, True])
def test_a_template_writes_the_prompt_and_leaves_the_columns(tmp_path, as_file):
    text = "{{ content | trim }} (of {{ tags | length }}) Think first."
    if as_file:
        (tmp_path / "a.jinja").write_text(text)
    path = write(tmp_path / "a.jsonl", ROWS)
    first, second = with_template(path, str(tmp_path / "a.jinja") if as_file else text)
    assert first.text == "one and one (of 1) Think first."
    assert second.text == "two and two (of 2) Think first."
    assert first.columns == load(path)[0].columns
    assert first.id != load(path)[0].id
    assert with_template({"t": path}, "{{ content }}!")[0].text == "one and one!"


def test_a_template_of_easyr1_with_its_columns(tmp_path):
    path = write(tmp_path / "a.parquet", [EASYR1])
    (prompt,) = with_template(path, "{{ content }} Use <think>.", prompt="problem")
    assert prompt.text == "<image>How many? Use <think>."


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ content", "not a Jinja template"),
        ("{{ contents }}", "'contents' is undefined; names in it may be: content, answer, tags"),
        ("{% if answer == 2 %}{{ content }}{% endif %}", "makes an empty text"),
        ("none.jinja", "No such file"),
        ("{{ content.__class__.__mro__ }}", "prompts.template"),  # sandboxed
    ],
)
def test_a_wrong_template_is_named(tmp_path, template, said):
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=r"prompts\.template") as error:
        with_template(path, template)
    assert said in str(error.value)


def test_a_template_is_for_texts(tmp_path):
    with pytest.raises(UserError, match=r"row 1: prompts\.template is for prompts that are a text"):
        with_template(write(tmp_path / "a.json", [VERL]), "{{ content }}")
