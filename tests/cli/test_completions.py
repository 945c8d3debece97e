"""Files of completions: what they hold, who reads them, and how a report shows them."""

from __future__ import annotations

import base64
import io

import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from test_report import HOSTILE, assert_self_contained, parse

from mmrl.completions import CompletionFiles, drop_after, pictures, write_table
from mmrl.report import write_report
from mmrl.rollouts import make_requests
from mmrl.types import Prompt, RolloutGroup
from rewards.combine import combined_scores, parse_specs, scored


def row(step, prompt="p", completion="c", **columns):
    numbers = {"rewards/red": 0.25, "reward": 0.5, "advantage": -1.5}
    return {"step": step, "prompt": prompt, "completion": completion, **numbers, **columns}


def test_columns_of_every_kind(tmp_path):
    path = tmp_path / "step-000001.parquet"
    rows = [
        row(1, answer="4", mixed=1, nested={"a": [1]}, count=3, huge=2**70),
        row(1, answer=None, mixed="x", nested=None, count=4, huge=1) | {"reward": None},
    ]
    write_table(path, rows, None)
    found = pd.read_parquet(path)
    assert found["count"].tolist() == [3, 4]
    assert found["mixed"].tolist() == ["1", '"x"']
    assert found["nested"][0] == '{"a": [1]}'
    assert found["huge"].tolist() == [2.0**70, 1.0]
    assert found["reward"].isna().tolist() == [False, True]
    write_table(path, rows[:1], None)
    assert len(pd.read_parquet(path)) == 1, "replaced, not added to"
    assert not list(tmp_path.glob("*.tmp"))


def first_number(prompts, outputs, **columns):
    return [float(text) for text in outputs]


def test_groups_of_unlike_sizes_keep_their_own_numbers(tmp_path):
    sizes = (1, 3, 2)
    prompts = [Prompt(id=str(n), text=f"size {n}") for n in sizes]
    groups = [
        RolloutGroup(
            request=request,
            outputs=[f"{request.group_size}.{i}" for i in range(request.group_size)],
            payload=None,
            mask=torch.ones(request.group_size, 1).bool(),
        )
        for request in make_requests(prompts, sizes, 0, 0)
    ]
    spec = parse_specs([{"name": "length"}])
    outcomes = [[scored(first_number, g, "length")] for g in groups]
    scores = [combined_scores(g, spec, o) for g, o in zip(groups, outcomes, strict=True)]
    for most, expected in ((6, "1.0 3.0 3.1 3.2 2.0 2.1"), (3, "1.0")):
        files = CompletionFiles(
            folder=tmp_path, accelerator=Accelerator(cpu=True), image_columns=(), max_rows=most
        )
        files.write("step", 1, groups, scores, torch.arange(6.0))
        found = pd.read_parquet(tmp_path / "step-000001.parquet")
        assert found["completion"].tolist() == expected.split()
        assert found["reward"].tolist() == [float(x) for x in expected.split()]
        assert found["advantage"].tolist() == list(range(len(expected.split())))


def picture(size, colour="red"):
    image, buffer = Image.new("RGB", size, colour), io.BytesIO()
    image.save(buffer, format="PNG")
    return image, buffer.getvalue()


def test_pictures_are_opened_by_datasets(tmp_path):
    image, data = picture((2000, 1000))
    (tmp_path / "a.png").write_bytes(data)
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [image, str(tmp_path / "a.png"), address, {"bytes": data, "path": None}]
    path = tmp_path / "step-000001.parquet"
    rows = [row(1, images=pictures(forms)), row(1, images=pictures(None))]
    write_table(path, rows, "images")
    found = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert [opened.size for opened in found[0]["images"]] == [(512, 256)] * 4
    assert found[0]["images"][0].getpixel((9, 9)) == (255, 0, 0)
    assert found[1]["images"] == []
    stored = pd.read_parquet(path)["images"][0][1]
    assert set(stored) == {"bytes", "path"}
    assert stored["path"] == str(tmp_path / "a.png")


def test_later_steps_are_dropped(tmp_path):
    for name in ("step-000002", "step-000003", "eval-000002", "eval-000004"):
        write_table(tmp_path / f"{name}.parquet", [row(1)], None)
    drop_after(tmp_path, 2)
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["eval-000002", "step-000002"]
    drop_after(tmp_path / "none", 2)


@pytest.mark.parametrize("kind", ["step", "eval"])
def test_a_report_shows_the_first_and_the_last_escaped(run, kind):
    for step in (1, 2, 3):
        rows = [row(step, f"{HOSTILE} {i}", f"{HOSTILE} said {step}.{i}") for i in range(8)]
        rows += [row(step, f"{HOSTILE} 0", "a second one")]
        pixels = pictures([picture((300, 10), "blue")[0]])
        for each in rows:
            each["images"] = pixels
        write_table(run / "completions" / f"{kind}-00000{step}.parquet", rows, "images")
    out = write_report(run)
    page = parse(out)
    assert_self_contained(out.read_text(), page)
    for i in range(6):
        assert f"{HOSTILE} said 1.{i}" in page.texts
        assert f"{HOSTILE} said 3.{i}" in page.texts
    assert f"{HOSTILE} {0}" in page.texts
    assert not any("said 2." in text or text == "a second one" for text in page.texts)
    assert page.texts.count("red 0.250, reward 0.500, advantage -1.500") == 12
    assert any("completions of 6 of 8 prompts" in text for text in page.texts)
    shown = [a for a in page.addresses if a.startswith("data:image/jpeg")]
    assert len(shown) == 12
    image = Image.open(io.BytesIO(base64.b64decode(shown[0].split(",")[1])))
    assert image.size == (256, 9)
