"""The learned preference: its formula, what it prefers in drawn pictures, and bad settings."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mmrl.errors import UserError
from mmrl.resolve import entries
from rewards.combine import parse_specs
from rewards.preference import Config, build

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "tiny-preference"
ASPECTS = {
    "contrast": ("a high-contrast picture", "a low-contrast picture"),
    "centring": ("a centred picture", "an off-centre picture"),
    "cleanliness": ("a clean picture", "a cluttered picture"),
}


@pytest.fixture(scope="module")
def open_clip():
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        pytest.skip(f"torch and torchvision are of different builds: {error}")
    return open_clip


def drawn(place=(32, 16), ink=0, noise=0.0):
    """A grey square on white, at a place (x, y), with noise behind it."""
    image = Image.new("L", (64, 32), 255)
    x, y = place
    pixels = np.asarray(image, float) - noise * np.random.default_rng(0).random((32, 64))
    image = Image.fromarray(pixels.round().astype(np.uint8))
    ImageDraw.Draw(image).rectangle((x - 6, y - 6, x + 5, y + 5), fill=ink)
    return image.convert("RGB")


GOOD = drawn()
WORSE = {
    "contrast": drawn(ink=170),
    "centring": drawn(place=(12, 8)),
    "cleanliness": drawn(noise=120.0),
}
PICTURES = [GOOD, *WORSE.values()]


def scores(images, **settings):
    reward = build(Config(**{"model_name": str(FOLDER), "device": "cpu", **settings}))
    return reward(["any prompt"] * len(images), images, text=["ignored"] * len(images))


def expected(open_clip, images, positive, negative):
    """One picture at a time; words numbered by hand, the rest of the formula in float64."""
    model = open_clip.create_model_from_pretrained(f"local-dir:{FOLDER}", return_transform=False)
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())["model"]["vocab"]

    def embedded(text):
        words = text.replace("-", " - ").replace(",", " , ").split()
        numbers = [vocabulary[word] for word in words] + [vocabulary["[EOS]"]]
        row = torch.tensor([numbers + [0] * (16 - len(numbers))])
        return model.encode_text(row)[0].double().numpy()

    def cosine(a, b):
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    result = []
    with torch.no_grad():
        good, bad, scale = embedded(positive), embedded(negative), model.logit_scale.exp().item()
        for image in images:
            pixels = torch.tensor((np.asarray(image) / 255 - 0.5) / 0.5, dtype=torch.float32)
            vector = model.encode_image(pixels.permute(2, 0, 1)[None])[0].double().numpy()
            weights = [math.exp(scale * cosine(vector, text)) for text in (good, bad)]
            result.append(weights[0] / sum(weights))
    return np.array(result)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_probability_of_the_positive_text(open_clip, batch_size):
    config = Config()
    found = scores(PICTURES, batch_size=batch_size)
    assert found.dtype == torch.float32
    wanted = expected(open_clip, PICTURES, config.positive, config.negative)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-5)
    # Far above the tolerance, so that the right formula is told from a wrong one.
    assert np.ptp(wanted) > 0.1
    flipped = scores(PICTURES, positive=config.negative, negative=config.positive)
    np.testing.assert_allclose(flipped.numpy(), 1 - wanted, atol=2e-5)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_each_aspect_lowers_the_score_and_most_of_all_its_own(open_clip, aspect):
    good, worse = scores([GOOD, WORSE[aspect]])
    assert good - worse > 0.1
    falls = {}
    for name, (positive, negative) in ASPECTS.items():
        good, worse = scores([GOOD, WORSE[aspect]], positive=positive, negative=negative)
        falls[name] = (good - worse).item()
    assert max(falls, key=falls.__getitem__) == aspect
    assert falls[aspect] > 0.3


def test_a_prompt_does_not_matter_and_no_image_needs_no_model():
    reward = build(Config(model_name=str(FOLDER)))
    assert reward(["a"], [GOOD]) == reward(["an off-centre picture"], [GOOD])
    assert reward([], []).shape == (0,)


def test_other_sizes_are_brought_to_the_model_size():
    # Sixteen-fold pixels, or a strip around the picture that is cut away, change next to nothing.
    big = GOOD.resize((256, 128), Image.Resampling.NEAREST)
    wide = Image.new("RGB", (96, 32), (90, 0, 0))
    wide.paste(GOOD, (16, 0))
    np.testing.assert_allclose(scores([big, wide]).numpy(), scores([GOOD] * 2).numpy(), atol=0.02)


def test_listed_with_its_summary():
    summaries = {entry.name: entry.summary for entry in entries("rewards")}
    assert "good description" in summaries["preference"]


def test_paths_are_checked_when_building(tmp_path):
    for name in ("assets/tiny-preferences", str(tmp_path), f"local-dir:{tmp_path}/missing"):
        with pytest.raises(UserError, match=r"model_name: no open_clip_config\.json in"):
            build(Config(model_name=name))
    shutil.copy(FOLDER / "open_clip_config.json", tmp_path)
    with pytest.raises(UserError, match=r"model_name: no \.safetensors"):
        build(Config(model_name=str(tmp_path)))
    with pytest.raises(UserError, match="brings its own weights"):
        build(Config(model_name=str(FOLDER), pretrained="openai"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("open_clip_model.safetensors", b"cut off"),
        ("open_clip_config.json", b"{"),
        ("open_clip_config.json", b'{"model_cfg": {"embed_dim": 8}}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_broken_files_are_named_errors(open_clip, tmp_path, name, content):
    folder = shutil.copytree(FOLDER, tmp_path / "model")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=r"open_clip cannot load 'local-dir:.*/model'"):
        scores([GOOD], model_name=str(folder))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"positive": ""}, r"rewards\[0\]\.positive: .*at least 1 character"),
        ({"postive": "x"}, r"rewards\[0\]\.postive: unknown key; did you mean 'positive'\?"),
        ({"batch_size": 0}, r"rewards\[0\]\.batch_size: .*greater than or equal to 1"),
    ],
)
def test_mistakes_in_a_file(entry, message):
    with pytest.raises(UserError, match=message):
        parse_specs([{"name": "preference", **entry}])
