"""The composition task: scenes, prompts, their split, and the tokenizers that spell them."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from assets import composition_task, shapes, textart
from assets.shapes import Kind, Placed, Scene, prompt_for, random_scene, render

PROMPTS = Path(__file__).resolve().parents[2] / "assets" / "prompts"
CROWD = [Kind(shape="square", colour="blue", count=3), Kind(shape="triangle", colour="yellow")]


@pytest.fixture(scope="module")
def split():
    return composition_task.split(0)


def shipped(name):
    text = (PROMPTS / f"composition-{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------- scenes


@pytest.mark.parametrize(
    ("kinds", "relation", "prompt"),
    [
        ([Kind(shape="circle")], None, "a circle"),
        ([Kind(shape="circle", colour="red")], None, "a red circle"),
        (
            [Kind(shape="circle", colour="red", count=2), Kind(shape="square", colour="blue")],
            None,
            "two red circles and a blue square",
        ),
        (
            [Kind(shape="triangle", colour="green"), Kind(shape="circle", colour="yellow")],
            "left of",
            "a green triangle left of a yellow circle",
        ),
    ],
)
def test_prompts(kinds, relation, prompt):
    assert prompt_for(kinds, relation) == prompt
    assert set(prompt.split()) <= set(shapes.words())


@pytest.mark.parametrize("seed", range(10))
def test_objects_touch_neither_each_other_nor_the_border(seed):
    scene = random_scene(CROWD, None, random.Random(seed))
    image = render(scene).astype(int)
    inked = np.abs(image - scene.background).max(2) > 0
    assert cv2.connectedComponents(inked.astype(np.uint8), connectivity=8)[0] == 1 + 4
    edges = (inked[0], inked[-1], inked[:, 0], inked[:, -1])
    assert not any(edge.any() for edge in edges)


@pytest.mark.parametrize(
    ("shape", "area"),
    [("circle", math.pi), ("square", math.pi), ("triangle", 0.75 * math.sqrt(3) * 1.4**2)],
)
@pytest.mark.parametrize("angle", [0.0, 0.2])
def test_area_place_and_colour(shape, area, angle):
    item = Placed(shape=shape, colour="red", x=20.3, y=14.8, radius=6.0, angle=angle)
    image = render(Scene(objects=(item,))).astype(float)
    # Red ink leaves 205 of 255 in its own channel, so the two others say how much of it there is.
    ink = (255 - image[:, :, 1]) / (255 - 25)
    # Polygons are filled up to and with their outline, half a subpixel all round: up to 3 %.
    assert ink.sum() == pytest.approx(area * 36, rel=0.035)
    rows, columns = np.mgrid[:32, :64] + 0.5
    assert (ink * columns).sum() / ink.sum() == pytest.approx(20.3, abs=0.1)
    assert (ink * rows).sum() / ink.sum() == pytest.approx(14.8, abs=0.1)
    assert tuple(image[14, 20]) == shapes.COLOURS["red"]


@pytest.mark.parametrize("relation", shapes.RELATIONS)
def test_relation_is_drawn_as_said(relation):
    kinds = [Kind(shape="circle", colour="red"), Kind(shape="square", colour="blue")]
    for seed in range(10):
        first, second = random_scene(kinds, relation, random.Random(seed)).objects
        dx, dy = first.x - second.x, first.y - second.y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        assert along > 8
        assert along >= 2 * min(abs(dx), abs(dy))
        assert along == max(abs(dx), abs(dy))


def test_layout_is_the_noise():
    drawn = [random_scene(CROWD, None, random.Random(seed)) for seed in range(200)]
    firsts = [scene.objects[0] for scene in drawn]
    assert {scene.background for scene in drawn} == set(textart.BACKGROUNDS)
    assert {item.radius for item in firsts} == set(shapes.RADII)
    # A square's centre is that of its box: 4 x 2 cells, three places beside the centre of each.
    assert {item.x for item in firsts} == {8 + 16 * i + d for i in range(4) for d in shapes.OFFSETS}
    assert {item.y for item in firsts} == {8 + 16 * i + d for i in range(2) for d in shapes.OFFSETS}
    assert random_scene(CROWD, None, random.Random(7)) == drawn[7]


def test_open_colour_is_one_for_all_objects_of_a_kind():
    kinds = [Kind(shape="circle", count=2), Kind(shape="square")]
    scenes = [random_scene(kinds, None, random.Random(seed)) for seed in range(30)]
    colours = [[item.colour for item in scene.objects] for scene in scenes]
    assert all(first == second for first, second, _ in colours)
    assert {c[0] for c in colours} == {c[2] for c in colours} == set(shapes.COLOURS)


# ---------------------------------------------------------------- prompts


def image_asked_for(row):
    """What a row shows, in one fixed wording, written without the generator's helpers."""
    named = [f"{o['count']} {o['colour']} {o['shape']}" for o in row["objects"]]
    if row["relation"] in ("right of", "below"):
        return ["left of" if row["relation"] == "right of" else "above", *reversed(named)]
    return [row["relation"], *(named if row["relation"] else sorted(named))]


def test_held_out_images_are_never_trained(split):
    held = [(row["tag"], *image_asked_for(row)) for row in split.evaluation]
    trained = {(row["tag"], *image_asked_for(row)) for row in split.pretraining}
    assert len(set(held)) == len(held)
    assert not set(held) & trained
    prompts = [row["prompt"] for row in split.evaluation + split.pretraining]
    assert len(set(prompts)) == len(prompts)
    pretrained = {row["prompt"] for row in split.pretraining}
    assert {row["prompt"] for row in split.tuning} <= pretrained


def test_shipped_prompts_are_the_split(split):
    assert shipped("eval") == split.evaluation
    assert shipped("train") == split.tuning
    assert len({row["prompt"] for row in split.tuning}) == len(split.tuning)
    assert composition_task.split(1).evaluation != split.evaluation


def test_every_tag_is_trained_and_held_out(split):
    held, tuned = (Counter(row["tag"] for row in rows) for rows in (split.evaluation, split.tuning))
    assert set(held) == set(tuned)
    assert len(held) == 6
    assert 64 <= sum(held.values()) <= 128
    assert held["single_object"] == 1
    for tag in ("two_objects", "counting", "position", "colour_attribution"):
        assert held[tag] >= 7


def test_rows_say_what_the_prompt_says(split):
    for row in split.evaluation + split.pretraining:
        kinds = [Kind(**entry) for entry in row["objects"]]
        assert prompt_for(kinds, row["relation"]) == row["prompt"]
        assert 1 <= sum(kind.count for kind in kinds) <= shapes.MAX_OBJECTS
        assert len({kind.shape for kind in kinds}) == len(kinds)
        assert (row["relation"] is not None) == (row["tag"] == "position")
        assert (max(kind.count for kind in kinds) > 1) or row["tag"] != "counting"


def test_pool_draws_by_share(split, monkeypatch):
    monkeypatch.setattr(composition_task, "render_row", lambda row, rng: np.zeros((1, 1, 3)))
    images, owner = composition_task.render_pool(split.pretraining, split.share, 0)
    assert len(images) == len(owner)
    assert set(owner) == set(range(len(split.pretraining)))
    drawn = Counter(split.pretraining[i]["tag"] for i in owner)
    total = sum(stratum.share for stratum in composition_task.strata())
    for tag in drawn:
        share = sum(s.share for s in composition_task.strata() if s.tag == tag)
        assert drawn[tag] / len(owner) == pytest.approx(share / total, rel=0.05)


# ---------------------------------------------------------------- tokenizers


def test_words_are_single_tokens_and_quoted_texts_are_spelt(split, tmp_path):
    models = pytest.importorskip("assets.tiny_models")
    clip, (_, t5) = models.write_tokenizer(tmp_path), models.silent_t5(16)
    for row in split.evaluation + split.pretraining:
        words = row["prompt"].split()
        tokens = clip.convert_ids_to_tokens(clip(row["prompt"]).input_ids)
        assert [token.removesuffix("</w>") for token in tokens[1:-1]] == words
        assert len(tokens) <= models.TEXT_LENGTH
        assert len(t5(row["prompt"]).input_ids) == len(words) + 1
    for text in textart.NUMBERS + textart.WORDS:
        tokens = clip.convert_ids_to_tokens(clip(textart.prompt_for(text, "red")).input_ids)
        assert [token.removesuffix("</w>") for token in tokens[5:-2]] == list(text.lower())
