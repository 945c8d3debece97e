"""JPEG rewards against a file written by PIL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from rewards import jpeg_compressibility, jpeg_incompressibility


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    return [noise, noise.convert("L"), Image.new("RGB", (64, 48), "red")]


@pytest.fixture(scope="module")
def kilobytes(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpeg")
    sizes = []
    for i, image in enumerate(images):
        path = folder / f"{i}.jpg"
        image.convert("RGB").save(path, quality=95)
        sizes.append(path.stat().st_size / 1000)
    return sizes


@pytest.mark.parametrize(
    ("module", "factor"), [(jpeg_compressibility, -1 / 500), (jpeg_incompressibility, 1.0)]
)
def test_size_on_disk(module, factor, images, kilobytes):
    scores = module.build(module.Config())(["p"] * 3, images, column=[1, 2, 3])
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx([factor * kb for kb in kilobytes], rel=1e-6)


def test_directions(images):
    noise, flat = images[0], images[2]
    smooth = jpeg_compressibility.build(jpeg_compressibility.Config())(["p"] * 2, [noise, flat])
    detailed = jpeg_incompressibility.build(jpeg_incompressibility.Config())(
        ["p"] * 2, [noise, flat]
    )
    assert smooth[0] < smooth[1] < 0
    assert detailed[0] > detailed[1] > 0


@pytest.mark.parametrize("module", [jpeg_compressibility, jpeg_incompressibility])
def test_refuses_what_is_no_image(module):
    with pytest.raises(TypeError, match="not str"):
        module.build(module.Config())(["p"], ["text"])
