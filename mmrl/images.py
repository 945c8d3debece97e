"""Labelled grids of samples that a person can read, however small the images are."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

# Not white: images with a white background keep their edges.
PAPER, INK, MUTED = "#e9edf2", "#111827", "#6b7280"
MARGIN, GAP = 16, 6
CAPTION_SIZE, TITLE_SIZE = 20, 26
ELLIPSIS = "\u2026"


def labelled_grid(
    images: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    *,
    columns: Sequence[str] = (),
    title: str = "",
    cell_width: int = 192,
) -> Image.Image:
    """One picture of ``images[row][column]``, each row under its caption.

    ``labels``: one caption a row, cut with an ellipsis where too long.  ``columns``: optional
    headings.  Rows may differ in length.  Images narrower than ``cell_width`` pixels are enlarged
    by a whole factor so that their pixels stay square, wider ones are reduced to it.

    Raises ``ValueError`` if there is no image or the numbers of rows and labels differ.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} rows of images, but {len(labels)} labels")
    cells = [[fit_width(image, cell_width) for image in row] for row in images]
    if not any(cells):
        raise ValueError("a grid needs at least one image")
    width = max(image.width for row in cells for image in row)
    num_columns = max(len(columns), *(len(row) for row in cells))
    total = 2 * MARGIN + num_columns * (width + GAP) - GAP
    strips = [_text_strip(title, total, TITLE_SIZE, INK)] if title else []
    strips += [_heading_strip(columns, total, width)] if columns else []
    for row, label in zip(cells, labels, strict=True):
        strips += [_text_strip(label, total, CAPTION_SIZE, INK), _image_strip(row, total, width)]
    return _stack(strips, total)


def fit_width(image: Image.Image, width: int) -> Image.Image:
    """``image`` in RGB, enlarged by the largest whole factor up to ``width``, or reduced to it."""
    image = image.convert("RGB")
    factor = width // image.width
    if factor >= 1:
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    size = (width, max(1, round(image.height * width / image.width)))
    return image.resize(size, Image.Resampling.LANCZOS)


def shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text`` on one line of at most ``width`` pixels, ending in an ellipsis where cut."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    # Not a linear cut: glyph widths differ, so the longest fitting prefix is searched.
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = font.getlength(text[:middle].rstrip() + ELLIPSIS) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    return text[:low].rstrip() + ELLIPSIS


def _text_strip(text: str, total: int, size: int, colour: str) -> Image.Image:
    font = ImageFont.load_default(size)
    strip = Image.new("RGB", (total, round(size * 1.5)), PAPER)
    line = shorten(text, font, total - 2 * MARGIN)
    ImageDraw.Draw(strip).text((MARGIN, size * 0.75), line, fill=colour, font=font, anchor="lm")
    return strip


def _heading_strip(columns: Sequence[str], total: int, width: int) -> Image.Image:
    font = ImageFont.load_default(CAPTION_SIZE)
    strip = Image.new("RGB", (total, round(CAPTION_SIZE * 1.5)), PAPER)
    draw = ImageDraw.Draw(strip)
    for i, heading in enumerate(columns):
        centre = MARGIN + i * (width + GAP) + width / 2
        text = shorten(heading, font, width)
        draw.text((centre, CAPTION_SIZE * 0.75), text, fill=MUTED, font=font, anchor="mm")
    return strip


def _image_strip(row: Sequence[Image.Image], total: int, width: int) -> Image.Image:
    height = max((image.height for image in row), default=0)
    strip = Image.new("RGB", (total, height), PAPER)
    for i, image in enumerate(row):
        strip.paste(image, (MARGIN + i * (width + GAP), 0))
    return strip


def _stack(strips: Sequence[Image.Image], total: int) -> Image.Image:
    height = sum(strip.height + GAP for strip in strips) - GAP + 2 * MARGIN
    canvas = Image.new("RGB", (total, height), PAPER)
    top = MARGIN
    for strip in strips:
        canvas.paste(strip, (0, top))
        top += strip.height + GAP
    return canvas
