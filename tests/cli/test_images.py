"""Labelled grids."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops, ImageFont

from mmrl.images import GAP, MARGIN, fit_width, labelled_grid, shorten


def solid(colour: str, size=(64, 32)) -> Image.Image:
    return Image.new("RGB", size, colour)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    channels = [ImageChops.difference(image, Image.new("RGB", image.size, colour))]
    return sum(not any(pixel) for pixel in channels[0].get_flattened_data())


def test_tiny_images_are_enlarged_by_a_whole_factor():
    image = solid("white")
    image.putpixel((10, 5), (255, 0, 0))
    large = fit_width(image, 192)
    assert large.size == (192, 96)
    assert count(large, (255, 0, 0)) == 9, "a pixel becomes a square of 3 x 3, with sharp edges"
    assert fit_width(image, 190).size == (128, 64)


def test_large_images_are_reduced():
    assert fit_width(solid("red", (512, 300)), 192).size == (192, 112)
    assert fit_width(solid("red", (192, 5)), 192).size == (192, 5)


def test_every_image_is_in_its_place():
    grid = labelled_grid([[solid("red"), solid("lime")], [solid("blue")]], ["one", "two"])
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)):
        assert count(grid, colour) == 192 * 96
    assert grid.width == 2 * MARGIN + 2 * 192 + GAP
    red = ImageChops.difference(grid, Image.new("RGB", grid.size, "red")).convert("L")
    green = ImageChops.difference(grid, Image.new("RGB", grid.size, "lime")).convert("L")
    assert _corner(red)[0] + 192 + GAP == _corner(green)[0]
    assert _corner(red)[1] == _corner(green)[1]


def _corner(difference: Image.Image) -> tuple[int, int]:
    box = difference.point(lambda x: 0 if x else 255).getbbox()
    assert box is not None
    return box[:2]


def test_captions_headings_and_title_are_drawn():
    rows = [[solid("white")]]
    bare = labelled_grid(rows, [""])
    assert count(labelled_grid(rows, ["caption"]), (17, 24, 39)) > 50, "pixels of dark ink"
    assert count(bare, (17, 24, 39)) == 0
    assert labelled_grid(rows, [""], title="title").height > bare.height
    assert labelled_grid(rows, [""], columns=["heading"]).height > bare.height


def test_modes_other_than_rgb():
    grid = labelled_grid([[Image.new("L", (64, 32), 0), Image.new("RGBA", (64, 32))]], ["x"])
    assert grid.mode == "RGB"


def test_long_captions_are_cut():
    font = ImageFont.load_default(16)
    text = "a sign with many words " * 20
    short = shorten(text, font, 300)
    assert short.endswith("\u2026")
    assert font.getlength(short) <= 300
    assert font.getlength(shorten(text, font, 10_000)) > 300
    assert shorten("two\nlines", font, 300) == "two lines"


def test_nothing_to_show_is_an_error():
    with pytest.raises(ValueError, match="at least one image"):
        labelled_grid([[], []], ["a", "b"])
    with pytest.raises(ValueError, match="1 rows of images, but 2 labels"):
        labelled_grid([[solid("red")]], ["a", "b"])
