"""Composition reward: rendered truth, deliberate mistakes, and scores against hand counting."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError

from assets import composition_task, distractors, shapes
from assets.shapes import Kind
from mmrl.errors import UserError
from rewards import _shapes, composition
from rewards._shapes import Blob, View, fill_ratios, view
from rewards.composition import Wanted, holds, relations, soft_score, strict_score

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts"
EVALUATION = [
    json.loads(line) for line in (PROMPTS / "composition-eval.jsonl").read_text().splitlines()
]
TAGS = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")


def rendered(rows, seed):
    rng = random.Random(seed)
    return np.stack([composition_task.render_row(row, rng) for row in rows])


def strict(images, rows):
    return composition_task.judge(images, rows, "strict")


def blob(shape="circle", colour="red", x=0.5, y=0.5, size=0.3):
    half = size / 2
    return Blob(shape=shape, colour=colour, box=(x - half, y - half, x + half, y + half))


def scene(*blobs, clutter=0.0):
    return View(blobs=blobs, clutter=clutter)


# --- on images ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", TAGS)
def test_rendered_truth_is_right(tag):
    rows = [row for row in EVALUATION if row["tag"] == tag]
    rows = (rows * 50)[:50]
    assert strict(rendered(rows, seed=1), rows).mean() >= 0.99
    assert composition_task.judge(rendered(rows, seed=1), rows, "soft").mean() >= 0.99


@pytest.mark.parametrize("mistake", distractors.DISTRACTORS, ids=lambda mistake: mistake.__name__)
def test_mistakes_score_zero(mistake):
    rng = random.Random(2)
    pairs = [(mistake(row, rng), row) for row in EVALUATION]
    images, rows = zip(*[pair for pair in pairs if pair[0] is not None], strict=True)
    assert len(images) >= 30
    assert strict(np.stack(images), rows).sum() == 0


@pytest.mark.parametrize(("blur", "noise"), [(0.7, 0), (0, 8), (0.7, 8)])
def test_blur_and_noise_do_no_harm(blur, noise):
    images = rendered(EVALUATION, seed=3).astype(float)
    if blur:
        images = np.stack([cv2.GaussianBlur(image, (0, 0), blur) for image in images])
    images += np.random.default_rng(0).normal(0, 1, images.shape) * noise
    images = images.round().clip(0, 255).astype(np.uint8)
    assert strict(images, EVALUATION).mean() >= 0.97


@pytest.mark.parametrize("height", [24, 128, 400])
def test_size_of_the_image_does_not_matter(height):
    images = rendered(EVALUATION, seed=4)
    method = cv2.INTER_AREA if height < 32 else cv2.INTER_CUBIC
    images = np.stack([cv2.resize(i, (2 * height, height), interpolation=method) for i in images])
    assert strict(images, EVALUATION).mean() >= 0.97


def drawn(draw_on, background="white", size=(256, 128)):
    image = Image.new("RGB", size, background)
    draw_on(ImageDraw.Draw(image))
    return np.asarray(image)


@pytest.mark.parametrize("colour", list(_shapes.PALETTE))
def test_shapes_of_another_renderer(colour):
    fill = _shapes.PALETTE[colour]

    def draw_on(draw):
        draw.ellipse((20, 40, 60, 80), fill=fill)
        draw.rectangle((100, 40, 140, 80), fill=fill)
        draw.polygon(((180, 80), (230, 80), (205, 37)), fill=fill)

    found = view(drawn(draw_on)).blobs
    assert {(b.shape, b.colour) for b in found} == {(s, colour) for s in _shapes.SHAPES}
    (circle,) = (b for b in found if b.shape == "circle")
    assert circle.box == pytest.approx((20 / 128, 40 / 128, 61 / 128, 81 / 128), abs=0.02)


@pytest.mark.parametrize(
    "draw_on",
    [
        lambda draw: draw.ellipse((20, 40, 100, 80), fill=(205, 25, 25)),
        lambda draw: draw.rectangle((20, 40, 100, 80), fill=(205, 25, 25)),
        lambda draw: draw.ellipse((40, 40, 90, 90), outline=(205, 25, 25), width=9),
        lambda draw: draw.rectangle((40, 40, 90, 90), outline=(205, 25, 25), width=9),
        lambda draw: draw.line(((20, 20), (220, 100)), fill=(205, 25, 25), width=9),
        lambda draw: draw.pieslice((40, 40, 100, 100), 0, 270, fill=(205, 25, 25)),
    ],
    ids=["ellipse", "rectangle", "ring", "frame", "line", "pie"],
)
def test_other_shapes_have_no_name(draw_on):
    (found,) = view(drawn(draw_on)).blobs
    assert (found.shape, found.colour) == ("", "red")


@pytest.mark.parametrize("fill", [(255, 150, 150), (128, 128, 128), (240, 110, 0), (0, 200, 200)])
def test_other_colours_have_no_name(fill):
    (found,) = view(drawn(lambda draw: draw.ellipse((40, 40, 90, 90), fill=fill))).blobs
    assert (found.shape, found.colour) == ("circle", "")


def test_two_coloured_object_has_no_colour():
    def draw_on(draw):
        draw.pieslice((40, 40, 90, 90), 90, 270, fill=(205, 25, 25))
        draw.pieslice((40, 40, 90, 90), 270, 90, fill=(25, 50, 200))

    (found,) = view(drawn(draw_on)).blobs
    assert (found.shape, found.colour) == ("circle", "")


def test_specks_are_no_objects_and_faint_texture_is_clutter():
    image = drawn(lambda draw: draw.ellipse((40, 40, 90, 90), fill=(205, 25, 25))).copy()
    image[10:14, 200:204] = 0
    assert len(view(image).blobs) == 1
    assert view(image).clutter < 2
    image[:, 128:] -= 30  # half of the image lies 52 from the background
    assert len(view(image).blobs) == 1
    assert view(image).clutter > composition.MAX_CLUTTER


def test_fill_ratios_of_ideal_shapes():
    yes = np.zeros((401, 401), dtype=np.uint8)
    circle = cv2.circle(yes.copy(), (200, 200), 150, 1, -1) > 0
    square = cv2.rectangle(yes.copy(), (50, 50), (350, 350), 1, -1) > 0
    corners = np.array([[50, 330], [350, 330], [200, round(330 - 150 * math.sqrt(3))]])
    triangle = cv2.fillPoly(yes.copy(), [corners], 1) > 0
    expected = {
        "circle": (circle, (1, math.pi / 4, math.pi / math.sqrt(27))),
        "square": (square, (2 / math.pi, 1, 0.5)),
        "triangle": (triangle, (math.sqrt(27) / (4 * math.pi), math.sqrt(3) / 4, 1)),
    }
    for mask, ratios in expected.values():
        assert list(fill_ratios(mask).values()) == pytest.approx(ratios, abs=0.01)


# --- scores -------------------------------------------------------------------------------------

RED_CIRCLES = Wanted(shape="circle", colour="red", count=2)
BLUE_SQUARE = Wanted(shape="square", colour="blue")


def test_strict_score():
    right = [blob(x=0.3), blob(x=0.8), blob("square", "blue", x=1.4)]
    wanted = [RED_CIRCLES, BLUE_SQUARE]
    assert strict_score(scene(*right), wanted, None) == 1
    assert strict_score(scene(*reversed(right)), wanted, None) == 1
    assert strict_score(scene(*right[1:]), wanted, None) == 0
    assert strict_score(scene(*right, blob("triangle")), wanted, None) == 0
    assert strict_score(scene(*right, blob("", "")), wanted, None) == 0
    assert strict_score(scene(*right, blob()), wanted, None) == 0
    assert strict_score(scene(*right, clutter=composition.MAX_CLUTTER + 1), wanted, None) == 0
    swapped = [blob(colour="blue", x=0.3), blob(colour="blue", x=0.8), blob("square", "red", x=1.4)]
    assert strict_score(scene(*swapped), wanted, None) == 0


def test_any_colour_will_do_where_none_is_asked_for():
    wanted = [Wanted(shape="circle")]
    assert strict_score(scene(blob(colour="green")), wanted, None) == 1
    assert strict_score(scene(blob(colour="")), wanted, None) == 1
    assert soft_score(scene(blob(colour="")), wanted, None) == 1


def soft_by_hand(shown, wanted, relation_holds):
    """The formula in plain loops: ``shown`` is a list of (shape, colour)."""
    scores = []
    for shape, colour, count in wanted:
        same_shape = sum(1 for s, _ in shown if s == shape)
        scores.append(1 - abs(count - same_shape) / count)
        if colour:
            both = sum(1 for s, c in shown if s == shape and c == colour)
            scores.append(1 - abs(count - both) / count)
    if relation_holds is not None:
        scores.append(1 if relation_holds else 0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(20))
def test_soft_score_formula(seed):
    rng = random.Random(seed)
    shown = [
        (rng.choice(["circle", "square", ""]), rng.choice(["red", "blue", ""])) for _ in range(seed)
    ]
    wanted = [("circle", rng.choice(["red", None]), rng.randint(1, 3)), ("square", "blue", 1)]
    entries = [Wanted(shape=s, colour=c, count=n) for s, c, n in wanted]
    blobs = [blob(shape, colour) for shape, colour in shown]
    expected = soft_by_hand(shown, wanted, None)
    assert soft_score(scene(*blobs), entries, None) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("x", "expected"), [(0.3, True), (1.7, False)])
def test_soft_score_counts_the_relation(x, expected):
    shown = scene(blob(x=x), blob("square", "blue", x=1.0))
    wanted = [Wanted(shape="circle", colour="red"), BLUE_SQUARE]
    score = soft_score(shown, wanted, "left of")
    assert score == pytest.approx(
        soft_by_hand(
            [("circle", "red"), ("square", "blue")],
            [("circle", "red", 1), ("square", "blue", 1)],
            expected,
        )
    )


def test_soft_score_is_not_floored():
    assert soft_score(scene(*[blob()] * 4), [Wanted(shape="circle")], None) == -2.0
    assert soft_score(scene(), [Wanted(shape="circle")], None) == 0.0


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ((-1.0, 0.0), {"left of"}),
        ((1.0, 0.0), {"right of"}),
        ((0.0, -1.0), {"above"}),
        ((0.0, 1.0), {"below"}),
        ((-1.0, 0.3), {"left of"}),
        ((-1.0, 1.0), {"left of", "below"}),
        ((0.05, 0.0), set()),
        ((0.0, 0.0), set()),
    ],
)
def test_relations(offset, expected):
    first = blob(x=1 + offset[0], y=0.5 + offset[1])
    assert relations(first, blob(x=1, y=0.5)) == expected


def test_relation_margin_grows_with_the_boxes():
    # Two boxes of size s: the offset 0.3 counts 0.3 - 0.1 * 2 s, which must exceed 0.15.
    for size, expected in ((0.7, {"left of"}), (0.8, set())):
        assert relations(blob(x=0.7, size=size), blob(x=1.0, size=size)) == expected


def test_relation_holds_for_every_pair_and_for_named_objects_only():
    wanted = [Wanted(shape="circle", colour="red"), BLUE_SQUARE]
    square = blob("square", "blue", x=1.0)
    assert holds(scene(blob(x=0.3), square), wanted, "left of")
    assert not holds(scene(blob(x=0.3), blob(x=1.6), square), wanted, "left of")
    assert holds(scene(blob(x=0.3), blob(colour="green", x=1.6), square), wanted, "left of")
    assert not holds(scene(blob(x=0.3)), wanted, "left of")
    assert not holds(scene(), wanted, "left of")


# --- the reward ---------------------------------------------------------------------------------

CIRCLE = Image.fromarray(drawn(lambda draw: draw.ellipse((40, 40, 90, 90), fill=(205, 25, 25))))


@pytest.fixture(params=["strict", "soft"])
def reward(request):
    return composition.build(composition.Config(mode=request.param))


def test_reward_on_columns(reward):
    red = [{"shape": "circle", "colour": "red", "count": 1}]
    blue = [{"shape": "circle", "colour": "blue"}]
    scores = reward(["p"] * 3, [CIRCLE] * 3, objects=[red, None, blue], tag=["colours"] * 3)
    assert scores.dtype == torch.float32
    assert scores[0] == 1
    assert scores[1].isnan()
    assert scores[2] < 1
    assert reward(["p"], [CIRCLE]).isnan().all()


def test_modes_differ():
    blue = [[{"shape": "circle", "colour": "blue", "count": 1}]]
    for mode, expected in (("strict", 0.0), ("soft", 0.5)):
        score = composition.build(composition.Config(mode=mode))
        assert score(["p"], [CIRCLE], objects=blue).tolist() == [expected]
    assert composition.Config().mode == "soft"


@pytest.mark.parametrize(
    ("objects", "relation", "message"),
    [
        ([{"shape": "circel"}], None, r"objects\[0\].shape.*'circle'"),
        ([{"shape": "circle", "colour": "pink"}], None, r"objects\[0\].colour.*'purple'"),
        ([{"shape": "circle", "count": 0}], None, r"objects\[0\].count.*greater than or equal"),
        ([{"shape": "circle", "color": "red"}], None, "did you mean 'colour'"),
        ([], None, "at least one entry"),
        ([{"shape": "circle"}] * 2, "left", "did you mean 'left of'"),
        ([{"shape": "circle"}], "left of", "needs two entries"),
    ],
)
def test_columns_are_checked(reward, objects, relation, message):
    with pytest.raises(UserError, match=message):
        reward(["p"], [CIRCLE], objects=[objects], relation=[relation])


def test_refuses_what_is_no_image(reward):
    with pytest.raises(TypeError, match="not str"):
        reward(["p"], ["text"], objects=[[{"shape": "circle"}]])


@pytest.mark.parametrize("bad", [{"mode": "exact"}, {"modes": "soft"}])
def test_config_is_strict(bad):
    with pytest.raises(ValidationError):
        composition.Config(**bad)


def test_names_agree_with_the_renderer():
    assert tuple(_shapes.SHAPES) == shapes.SHAPES
    assert _shapes.PALETTE == shapes.COLOURS
    assert set(composition.DIRECTIONS) == set(shapes.RELATIONS)
    for name in _shapes.PALETTE:
        for shape in _shapes.SHAPES:
            Wanted(shape=shape, colour=name)
    assert Kind(shape="circle").count == Wanted(shape="circle").count == 1
