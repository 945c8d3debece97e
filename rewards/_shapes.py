"""What shapes stand in an image? Classical vision: no model, about a millisecond an image.

An object is a connected patch that differs from the background.  Its outline is drawn at half the
contrast between patch and background on an enlarged image, which places it between pixels and
leaves it where it was under blur.  The outline is then compared with the tightest circle, square
and triangle around it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

SHAPES = ("circle", "square", "triangle")
PALETTE = {
    "red": (205, 25, 25),
    "blue": (25, 50, 200),
    "green": (10, 120, 40),
    "yellow": (240, 190, 0),
    "purple": (125, 25, 150),
    "black": (15, 15, 15),
}
"""RGB of the colours that have a name."""

WORKING_HEIGHT = 128
"""Rows at which outlines are drawn; smaller images are enlarged, larger ones reduced."""
VISIBLE = 80.0
"""Distance in RGB from the background at which something begins to count as seen."""
MIN_AREA = 0.8
"""Least area of an object, in squares of a tenth of the image's height."""
MIN_FILL = 0.78
"""Least part of its tightest circle, square or triangle that an outline must fill."""
MAX_COLOUR_DISTANCE = 75.0
"""Largest distance in RGB at which a colour still bears the name of the nearest one."""
MIN_AGREEMENT = 0.8
"""Least part of an object's inside that must bear one name."""

_TENTH = WORKING_HEIGHT // 10
_NAMES = np.array(["", *PALETTE])
_COLOURS = np.array(list(PALETTE.values()), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Blob:
    """One object: ``shape`` and ``colour`` as named above, "" where none fits.

    ``box``: left, top, right, bottom as fractions of the image's height.
    """

    shape: str
    colour: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class View:
    """What was seen.  ``clutter``: mean RGB distance from the background beside the objects."""

    blobs: tuple[Blob, ...]
    clutter: float


@dataclass(frozen=True, kw_only=True)
class _Patch:
    """Connected pixels: ``mask`` [h, w] bool, its upper left one at (``left``, ``top``)."""

    mask: np.ndarray
    left: int
    top: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The part of ``image`` [H, W, ...] that lies under the mask."""
        height, width = self.mask.shape
        return image[self.top : self.top + height, self.left : self.left + width]


def view(image: np.ndarray) -> View:
    """The objects in a uint8 RGB image [H, W, 3], in no particular order."""
    rgb = _resized(image)
    # The colour of most of the border; objects may touch it, but hardly cover half of it.
    background = np.median(np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]]), axis=0)
    contrast = _distance(rgb, background)
    patches = list(_objects(contrast))
    blobs = tuple(_blob(patch, rgb) for patch in patches)
    return View(blobs=blobs, clutter=_clutter(contrast, patches))


def _resized(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    size = (max(1, round(width * WORKING_HEIGHT / height)), WORKING_HEIGHT)
    method = cv2.INTER_CUBIC if height < WORKING_HEIGHT else cv2.INTER_AREA
    return cv2.resize(image.astype(np.float32), size, interpolation=method)


def _distance(rgb: np.ndarray, colour: np.ndarray) -> np.ndarray:
    difference = rgb - colour.astype(np.float32)
    return np.sqrt(np.einsum("ijk,ijk->ij", difference, difference))


# --- finding ------------------------------------------------------------------------------------


def _objects(contrast: np.ndarray) -> Iterator[_Patch]:
    """Patches above half of their own contrast to the background."""
    for rough in _patches(contrast > VISIBLE):
        inside = rough.cut(contrast)
        # The ninth decile, because the maximum may be one noisy pixel.
        half = 0.5 * np.percentile(inside[rough.mask], 90)
        for patch in _patches(rough.mask & (inside > half)):
            yield _Patch(mask=patch.mask, left=rough.left + patch.left, top=rough.top + patch.top)


def _patches(mask: np.ndarray) -> Iterator[_Patch]:
    """The connected parts of ``mask`` [H, W] that are large enough."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=4
    )
    for label in range(1, count):
        left, top, width, height, area = stats[label].tolist()
        if area >= MIN_AREA * _TENTH**2:
            cut = labels[top : top + height, left : left + width]
            yield _Patch(mask=cut == label, left=left, top=top)


def _clutter(contrast: np.ndarray, patches: list[_Patch]) -> float:
    covered = np.zeros(contrast.shape, dtype=np.uint8)
    for patch in patches:
        patch.cut(covered)[patch.mask] = 1
    beside = cv2.dilate(covered, np.ones((2 * _TENTH + 1, 2 * _TENTH + 1), np.uint8)) == 0
    return float(contrast[beside].mean()) if beside.any() else 0.0


# --- naming -------------------------------------------------------------------------------------


def _blob(patch: _Patch, rgb: np.ndarray) -> Blob:
    height, width = patch.mask.shape
    left, top = patch.left / WORKING_HEIGHT, patch.top / WORKING_HEIGHT
    return Blob(
        shape=_shape(patch.mask),
        colour=_colour(patch, rgb),
        box=(left, top, left + width / WORKING_HEIGHT, top + height / WORKING_HEIGHT),
    )


def _shape(mask: np.ndarray) -> str:
    """The shape whose tightest instance around ``mask`` is filled best, "" if none well enough."""
    fills = fill_ratios(mask)
    best = max(fills, key=lambda name: fills[name])
    return best if fills[best] >= MIN_FILL else ""


def fill_ratios(mask: np.ndarray) -> dict[str, float]:
    """Area of the connected ``mask`` [H, W] over that of its tightest circle, square, triangle.

    Ideal shapes fill their own kind wholly, the others as follows.  Circle: square 0.785, triangle
    0.605.  Square: circle 0.637, triangle 0.5.  Equilateral triangle: circle 0.413, square 0.433.
    """
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    # Outlines run through pixel centres; all areas are those between such lines.
    areas = [cv2.contourArea(outline) for outline in outlines]
    outer = int(np.argmax(areas))
    area = 2 * areas[outer] - sum(areas)  # holes are not filled
    hull = cv2.convexHull(outlines[outer])
    _, radius = cv2.minEnclosingCircle(hull)
    _, sides, _ = cv2.minAreaRect(hull)
    triangle, _ = cv2.minEnclosingTriangle(hull)
    tightest = (np.pi * radius**2, max(sides) ** 2, triangle)
    return {name: area / max(t, 1e-6) for name, t in zip(SHAPES, tightest, strict=True)}


def _colour(patch: _Patch, rgb: np.ndarray) -> str:
    """The name that most of the patch's inside bears, "" if it is of several colours or none."""
    padded = np.pad(patch.mask.astype(np.uint8), 1)
    depth = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
    # Edges are mixtures with the background: look only where it is far away.
    inside = patch.cut(rgb)[depth >= 0.4 * depth.max()]
    distances = np.linalg.norm(inside[:, None] - _COLOURS, axis=2)
    index = np.where(distances.min(1) <= MAX_COLOUR_DISTANCE, distances.argmin(1) + 1, 0)
    counts = np.bincount(index, minlength=len(_NAMES))
    best = int(counts.argmax())
    return str(_NAMES[best]) if counts[best] >= MIN_AGREEMENT * len(inside) else ""
