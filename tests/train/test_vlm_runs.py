"""A vision-language model through the whole loop: images, videos and text, the tower trained."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_text_runs import close, config
from toy.run import ROOT, column, launch, metrics_of, weights_of

from mmrl.config import parse
from mmrl.errors import UserError
from mmrl.preflight import describe
from mmrl.runner import train
from mmrl.types import Prompt

sys.path.insert(0, str(ROOT / "tests" / "vlm"))

from tiny_vlm import FAMILIES, save_films, save_model, save_pictures

VAS = "prompts.sampler={name: vas, beta: 0.5}"
SLOW_BUT_ONE = [
    pytest.param(name, marks=[pytest.mark.slow] if place else [])
    for place, name in enumerate(sorted(FAMILIES, reverse=True))
]
"""Families for a test that starts processes: by default it runs for the newest."""
per_family = pytest.mark.parametrize("family", SLOW_BUT_ONE, indirect=True, scope="module")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory):
    torch.set_num_threads(1)
    return save_model(tmp_path_factory.mktemp(family), family)


def vlm_config(model: Path, family: str, folder: Path, *overrides: str) -> dict:
    # Adam would scale what sums in another order leave of tiny gradients up to its rate.
    options = ("backend.name=vlm", f"backend.model.family={family}", "optimizer.eps=1e-3")
    data = config(model, folder, *options, *overrides)
    write_prompts(data, save_pictures(folder))
    pixels = {"min_pixels": 784, "max_pixels": 7000}
    data["backend"] |= {"images": pixels, "videos": pixels}
    return data


def write_prompts(data: dict, prompts: list[Prompt]) -> None:
    rows = [json.dumps({"prompt": prompt.text, **prompt.columns}) for prompt in prompts]
    Path(data["prompts"]["source"]).write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of pictures and all runs: a prompt's id, and with it its noise, follows from its paths."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def unbroken(model, family, folder):
    return train(parse(vlm_config(model, family, folder, VAS) | named(folder, family, "whole")))


def named(folder: Path, family: str, name: str) -> dict:
    return {"output_dir": str(folder / family / name)}


def test_it_trains_and_leaves_a_processor(unbroken):
    assert all(norm > 0 for norm in column(unbroken, "grad_norm"))
    found = {path.name for path in (unbroken / "final").iterdir()}
    assert found & {"preprocessor_config.json", "processor_config.json"}


def test_completions_have_the_pictures_of_their_prompts(unbroken, tmp_path):
    file = str(unbroken / "completions" / "eval-000004.parquet")
    rows = Dataset.from_parquet(file, cache_dir=str(tmp_path))
    assert {len(row["images"]) for row in rows} == {0, 1, 2}
    assert all(image.width > 1 for row in rows for image in row["images"])
    assert "data:image/jpeg" in (unbroken / "report.html").read_text()


def test_a_resumed_run_is_bit_identical(model, family, folder, unbroken):
    for steps, resume in ((2, False), (4, True)):
        data = vlm_config(model, family, folder, VAS, f"training.num_steps={steps}")
        cut = train(parse(data | named(folder, family, "cut")), resume=resume)
    assert metrics_of(cut) == metrics_of(unbroken)
    left, right = weights_of(unbroken), weights_of(cut)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_the_column_of_trl(model, family, tmp_path, capsys):
    """Its image reaches the completions; a run without images or videos says so."""
    short = ("training.num_steps=1", "training.prompts_per_step=1", "evaluation.max_prompts=1")
    data = vlm_config(model, family, tmp_path, *short)
    prompts = save_pictures(tmp_path)
    write_prompts(data, [replace(prompts[0], columns={"image": prompts[0].columns["images"]})])
    run = train(parse(data | named(tmp_path, family, "image")))
    found = str(run / "completions" / "step-000001.parquet")
    rows = Dataset.from_parquet(found, cache_dir=str(tmp_path / "cache"))
    assert [len(row["images"]) for row in rows] == [1] * len(rows)
    assert "image" not in rows.column_names
    assert "no prompt has an image" not in capsys.readouterr().out
    write_prompts(data, prompts[2:])
    assert "no prompt has an image" in dict(describe(parse(data)))["note"]
    train(parse(data | named(tmp_path, family, "text")))
    assert "prompts.source: no prompt has an image or a video" in unwrapped(capsys)


def test_a_missing_image_is_found_by_check(model, family, tmp_path):
    data = vlm_config(model, family, tmp_path)
    prompts = save_pictures(tmp_path)
    lost = replace(prompts[1], columns={"images": [prompts[0].columns["images"], "lost.png"]})
    write_prompts(data, [prompts[0], lost, prompts[2]])
    data |= {"evaluation": data["evaluation"] | {"source": None}}
    source = data["prompts"]["source"]
    words = rf"^prompts\.source: {source}:2: prompt 'add .*images' names 'lost\.png'"
    with pytest.raises(UserError, match=words):
        describe(parse(data))
    held_out = tmp_path / "held-out.jsonl"
    Path(source).rename(held_out)
    write_prompts(data, prompts)
    data |= {"evaluation": data["evaluation"] | {"source": str(held_out)}}
    with pytest.raises(UserError, match=rf"^evaluation\.source: {held_out}:2: .*'lost\.png'"):
        describe(parse(data))
    data["evaluation"]["max_prompts"] = 1  # the others are not looked at
    describe(parse(data))


def unwrapped(capsys) -> str:
    """What was printed, without the terminal's breaks of lines."""
    return " ".join(capsys.readouterr().out.split())


@per_family
def test_two_processes_equal_one(model, family, folder, unbroken, tmp_path):
    data = vlm_config(model, family, folder, VAS) | named(folder, family, "two")
    done = launch(data, tmp_path / "config.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    close(unbroken, folder / family / "two")


# The tower trained


FORMS = {"qwen2_5_vl": (), "qwen3_vl": ("backend.model.lora=null",)}
"""Adapters in the tower, and all parameters."""


def vision_config(model: Path, family: str, folder: Path, *overrides: str) -> dict:
    """A prompt with an image and a video, and one of text: two processes have one each."""
    length = "{name: length, label: red, a: 0, b: 30, c: 31, d: 60, unit: characters}"
    options = (
        "backend.model.train_vision=true",
        "training.prompts_per_step=2",
        f"rewards=[{length}]",
    )
    data = vlm_config(model, family, folder, *options, *FORMS[family], *overrides)
    write_prompts(data, [p for p in save_films(folder) if p.id in ("mixed", "none")])
    return data


@pytest.fixture(scope="module")
def films(family, tmp_path_factory):
    return tmp_path_factory.mktemp("films")


@pytest.fixture(scope="module")
def trained(model, family, films):
    return train(parse(vision_config(model, family, films) | named(films, family, "whole")))


def test_the_tower_trains(trained):
    tower = {name: value for name, value in weights_of(trained).items() if ".visual." in name}
    assert len(tower) > 10
    assert all(norm > 0.01 for norm in column(trained, "grad_norm"))


def test_a_resumed_run_with_the_tower_is_bit_identical(model, family, films, trained):
    for steps, resume in ((2, False), (4, True)):
        data = vision_config(model, family, films, f"training.num_steps={steps}")
        cut = train(parse(data | named(films, family, "cut")), resume=resume)
    assert metrics_of(cut) == metrics_of(trained)
    left, right = weights_of(trained), weights_of(cut)
    assert all(torch.equal(left[name], right[name]) for name in left)


@per_family
def test_a_process_without_a_picture(model, family, films, trained, tmp_path):
    data = vision_config(model, family, films) | named(films, family, "two")
    done = launch(data, tmp_path / "config.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    close(trained, films / family / "two")
