"""Measures of held-out pictures against numbers worked out by hand."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from assets import build_preference, shapes
from benchmarks import gold, judges, tables
from rewards.combine import parse_specs


def picture(pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, dtype=np.uint8))


def plain(colour, size=(4, 3)) -> Image.Image:
    return Image.new("RGB", size, colour)


def measure(name: str, *images: Image.Image) -> list[float]:
    return gold.MEASURES[name](["p"] * len(images), list(images), text=["X"] * len(images))


def test_saturation():
    found = measure("saturation", plain((200, 0, 0)), plain((9, 9, 9)), plain((100, 50, 50)))
    assert found == pytest.approx([1.0, 0.0, 0.5])
    assert measure("saturation", plain((0, 0, 0))) == [0.0]


def test_contrast():
    halves = np.zeros((2, 4, 3))
    halves[:, 2:] = 255
    assert measure("contrast", picture(halves), plain((80, 80, 80))) == pytest.approx([0.5, 0.0])


def test_grain_of_one_white_pixel():
    dot = np.zeros((5, 5, 3))
    dot[2, 2] = 255
    # Of the 9 inner pixels the dot has Laplacian -4 and its four neighbours 1.
    expected = np.sqrt((16 + 4) / 9)
    assert measure("grain", picture(dot)) == pytest.approx([expected])


def test_grain_does_not_see_a_slope():
    slope = np.repeat(np.arange(0, 60, 10)[None, :, None], 3, axis=2).repeat(4, axis=0)
    assert measure("grain", picture(slope)) == pytest.approx([0.0], abs=1e-12)


def test_diversity_is_that_of_the_prompt():
    images = [plain((0, 0, 0)), plain((255, 255, 255)), plain((0, 0, 0))]
    assert measure("diversity", *images) == pytest.approx([2 / 3] * 3)


def test_the_template_judge_reads_each_picture():
    images, texts = judges.ground_truth(4, seed=2)
    wrong = [*texts[:3], "12" if texts[3] != "12" else "13"]
    found = gold.template(["p"] * 4, images, text=[text.lower() for text in wrong])
    assert found == [1.0, 1.0, 1.0, 0.0]


def test_utility_follows_the_stated_preference():
    """On pictures whose grades are known, softened as decoded ones are."""
    rows = build_preference.split(0).evaluation
    layers = build_preference.render_layers(build_preference.text_split(0)[1], rows, 200, 5)
    generator = torch.Generator().manual_seed(1)
    pictures, grades = build_preference.compose(
        layers, build_preference.random_look(layers, generator)
    )
    images = build_preference.to_images(build_preference.softened(pictures, generator))
    found = torch.tensor(gold.utility([""] * len(images), images))
    stated = build_preference.utility(grades)
    first, second = torch.stack([found, stated]).chunk(2, dim=1)
    assert build_preference.agreement(first, second, build_preference.CLEAR) > 0.94
    assert float((found - stated).abs().mean()) < 0.08


def test_an_empty_picture_has_no_utility():
    assert gold.utility(["p"], [plain((9, 200, 9), (64, 32))]) == [0.0]


def test_faithful_pictures_show_what_was_asked():
    sign, text = (found[0] for found in judges.ground_truth(1, seed=2))
    scene = Image.fromarray(
        shapes.render(
            shapes.random_scene(
                [shapes.Kind(shape="circle", colour="red", count=2),
                 shapes.Kind(shape="square", colour="blue", count=1)],
                None,
                random.Random(0),
            )
        )
    )  # fmt: skip
    asked = {
        f'a sign "{text}"': (sign, 1.0),
        'a sign "ZZZ"': (sign, 0.0),
        "red circles": (scene, 1.0),
        "circles and squares": (scene, 1.0),
        "red circles and blue squares": (scene, 1.0),
        "blue circles": (scene, 0.0),
        "red circles and triangles": (scene, 0.0),
    }
    images = [image for image, _ in asked.values()]
    assert gold.faithful(list(asked), images) == [expected for _, expected in asked.values()]


@pytest.mark.parametrize("file", ["preference-train", "preference-eval"])
def test_every_open_prompt_is_understood(file):
    rows = (tables.ROOT / "assets" / "prompts" / f"{file}.jsonl").read_text().splitlines()
    for prompt in (json.loads(row)["prompt"] for row in rows):
        named = sum(word.rstrip("s") in shapes.SHAPES for word in prompt.split())
        assert gold.SIGN.fullmatch(prompt) or len(gold.OBJECTS.findall(prompt)) == named > 0


def test_the_section_of_a_run_names_every_measure():
    names = gold.available("ocr")
    specs = parse_specs(gold.evaluation_rewards(names, "ocr"))
    assert [spec.label for spec in specs] == ["ocr_exact", "ocr_soft", *names]
    built = [spec.build() for spec in specs[2:]]
    picked = [name for name in names if name not in ("template", "ddddocr")]
    images = [plain((200, 0, 0)), plain((0, 0, 200))]
    for name in picked:
        reward = built[names.index(name)]
        assert reward(["p"] * 2, images, text=["A"] * 2) == measure(name, *images)


def test_available_leaves_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(gold, "find_spec", lambda name: None)
    assert gold.available("ocr") == ["template", "saturation", "contrast", "grain", "diversity"]
