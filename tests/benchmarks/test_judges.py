"""The judges read rendered signs, and the diversity is the documented formula."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from assets import textart
from benchmarks.judges import (
    DdddOcr,
    TemplateJudge,
    accuracy,
    available_judges,
    diversity,
    ground_truth,
)


@pytest.fixture(scope="module")
def template():
    return TemplateJudge()


def plain(level: int) -> Image.Image:
    return Image.new("RGB", (4, 2), (level, level, level))


def test_template_judge_reads_rendered_signs(template):
    images, texts = ground_truth(200)
    assert accuracy(template, images, texts) > 0.98


def test_template_judge_ignores_small_noise(template):
    images, texts = ground_truth(50, seed=1)
    rng = np.random.default_rng(0)
    noisy = [
        Image.fromarray(
            np.clip(np.asarray(i) + rng.normal(0, 20, (32, 64, 3)), 0, 255).astype("u1")
        )
        for i in images
    ]
    assert accuracy(template, noisy, texts) > 0.95


def test_template_judge_survives_a_flat_picture(template):
    assert template.read([Image.new("RGB", (64, 32))])[0] in textart.NUMBERS + textart.WORDS


def test_accuracy_counts_exact_readings_whatever_the_case():
    class Fixed:
        name = "fixed"

        def read(self, images):
            return ["CAT", "42", ""]

    assert accuracy(Fixed(), [plain(0)] * 3, ["cat", "43", "7"]) == pytest.approx(1 / 3)


def test_ddddocr_reads_rendered_signs():
    pytest.importorskip("ddddocr")
    images, texts = ground_truth(40)
    assert accuracy(DdddOcr(), images, texts) > 0.9


def test_template_judge_is_always_there():
    assert available_judges()[-1].name == "template"


def test_ground_truth_follows_from_its_seed():
    first, again, other = ground_truth(20, 3), ground_truth(20, 3), ground_truth(20, 4)
    assert first[1] == again[1]
    assert all(np.array_equal(a, b) for a, b in zip(first[0], again[0], strict=True))
    assert first[1] != other[1]


def test_diversity_by_hand():
    # Prompt one: pairs (0, 51), (0, 102), (51, 102) -> 0.2, 0.4, 0.2, mean 0.8/3.
    # Prompt two: copies, 0.  Prompt three has one picture and is left out.
    groups = [[plain(0), plain(51), plain(102)], [plain(9), plain(9)], [plain(200)]]
    assert diversity(groups) == pytest.approx((0.8 / 3 + 0) / 2)


def test_diversity_is_a_root_mean_square_not_a_mean_distance():
    half = np.zeros((2, 4, 3), np.uint8)
    half[0] = 255
    assert diversity([[plain(0), Image.fromarray(half)]]) == pytest.approx(0.5**0.5)


def test_diversity_needs_a_pair():
    with pytest.raises(ValueError, match="two pictures"):
        diversity([[plain(0)], []])
