"""Measures of held-out pictures against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from benchmarks import gold, judges
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


def test_the_section_of_a_run_names_every_measure():
    names = gold.available()
    specs = parse_specs(gold.evaluation_rewards(names))
    assert [spec.label for spec in specs] == ["ocr_exact", "ocr_soft", *names]
    built = [spec.build() for spec in specs[2:]]
    picked = [name for name in names if name not in ("template", "ddddocr")]
    images = [plain((200, 0, 0)), plain((0, 0, 200))]
    for name in picked:
        reward = built[names.index(name)]
        assert reward(["p"] * 2, images, text=["A"] * 2) == measure(name, *images)


def test_available_leaves_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(gold, "find_spec", lambda name: None)
    assert gold.available() == ["template", "saturation", "contrast", "grain", "diversity"]
