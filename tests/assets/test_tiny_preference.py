"""The shipped preference model: files, what it was told to prefer, and whether it does."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import preference

build = pytest.importorskip("assets.build_preference", reason="open_clip must be importable")

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FOLDER = ASSETS / "tiny-preference"
SEED = 100


@pytest.fixture(scope="module")
def manifest():
    return json.loads((FOLDER / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def layers(manifest):
    """Signs of texts, and scenes of prompts, that the model was never trained on."""
    rows = build.split(0).evaluation
    return build.render_layers(manifest["texts_never_trained"], rows, 240, SEED)


@pytest.fixture(scope="module")
def score():
    reward = preference.build(preference.Config(model_name=str(FOLDER), device="cpu"))
    return lambda images: reward([""] * len(images), images)


def look(layers, seed=SEED):
    return build.random_look(layers, torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- files


def test_manifest_lists_every_file_with_its_checksum(manifest):
    shipped = {path.name for path in FOLDER.iterdir()} - {"manifest.json"}
    assert set(manifest["files"]) == shipped
    for name, entry in manifest["files"].items():
        data = (FOLDER / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        assert len(data) == entry["bytes"], name


def test_folder_is_small_half_precision_safetensors(manifest):
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 2e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    with (FOLDER / "open_clip_model.safetensors").open("rb") as handle:
        head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    head.pop("__metadata__", None)
    assert {entry["dtype"] for entry in head.values()} == {"F16"}
    numbers = sum(math.prod(entry["shape"]) for entry in head.values())
    assert numbers == manifest["parameters"] < 500_000


def test_manifest_reports_agreement(manifest):
    held = manifest["held_out"]
    assert held.pop("mean_error_of_the_utility") < 0.03
    assert held.pop("any_two_pictures_with_close_ones") >= 0.9
    assert len(held) == 5
    assert min(held.values()) >= 0.94
    for curve in manifest["mean_scores_best_to_worst"].values():
        assert curve == sorted(curve, reverse=True)
    assert 0 < manifest["milliseconds_per_image"]["batches of 32"] < 20


def test_manifest_says_what_the_script_does(manifest):
    trained, held = build.text_split(0)
    assert held == manifest["texts_never_trained"]
    assert len(held) >= 20
    assert not set(trained) & set(held)
    assert manifest["texts"] == {name: list(pair) for name, pair in build.TEXTS.items()}
    assert build.TEXTS["overall"] == (
        preference.Config().positive,
        preference.Config().negative,
    )


def test_rewritten_tokenizer_is_the_shipped_one(tmp_path):
    import open_clip

    tokenizer, vocabulary = build.write_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    config = json.loads((FOLDER / "open_clip_config.json").read_text(encoding="utf-8"))
    assert config == build.model_config(vocabulary)
    tokens = build.tokenise(tokenizer)
    texts = [text for pair in build.TEXTS.values() for text in pair]
    torch.testing.assert_close(tokens, open_clip.get_tokenizer(f"local-dir:{FOLDER}")(texts))
    assert vocabulary.index("[UNK]") not in tokens
    # The text tower pools at the first greatest number.
    assert (tokens.max(1).values == vocabulary.index("[EOS]")).all()


# ---------------------------------------------------------------- the stated preference


def grades_by_loops(alpha, ink, picture, background):
    """Contrast, centring and cleanliness of one picture, pixel by pixel."""
    total, luma, x, y, square, free = 0.0, 0.0, 0.0, 0.0, 0.0, 0
    for row in range(32):
        for column in range(64):
            a = float(alpha[0, row, column])
            r, g, b = (float(v) for v in ink[:, row, column])
            total += a
            luma += abs(0.299 * r + 0.587 * g + 0.114 * b)
            x += a * (column + 0.5 - 32)
            y += a * (row + 0.5 - 16)
            if a == 0:
                free += 1
                square += sum(float(v) ** 2 for v in picture[:, row, column] - background)
    distance = math.hypot(x / total / 24, y / total / 12)
    clutter = math.sqrt(square / (3 * free))
    grades = luma / total / 255 / 0.9, 1 - distance, 1 - clutter / 32
    return [min(1.0, max(0.0, grade)) for grade in grades]


def test_grades_against_loops(layers):
    some = layers.take(torch.arange(8))
    chosen = look(some)
    pictures, grade = build.compose(some, chosen)
    for i in range(len(some)):
        dx, dy = chosen.shift[i].tolist()
        ink = chosen.contrast[i] * some.ink[i].roll((dy, dx), (1, 2))
        alpha = some.alpha[i].roll((dy, dx), (1, 2))
        background = some.background[i][:, None, None]
        wanted = (background + ink + (1 - alpha) * chosen.pattern[i]).round().clamp(0, 255)
        torch.testing.assert_close(pictures[i], wanted)
        found = grades_by_loops(alpha, ink, pictures[i], some.background[i])
        # Sums of 2048 float32 numbers.
        np.testing.assert_allclose(grade[i].numpy(), found, atol=1e-4)
    assert grade.std(0).min() > 0.05
    torch.testing.assert_close(build.utility(grade), grade.sum(1) / 3)


def test_no_look_cuts_the_ink(layers):
    low, high = build._room(layers.alpha)
    assert (low <= 0).all()
    assert (high >= 0).all()
    for shift in (low, high, build.centring_shift(layers), look(layers).shift):
        moved = build._moved(layers.alpha, shift)
        there = build.offset(moved) - build.offset(layers.alpha)
        # Wrapped ink would move its centre by less.
        torch.testing.assert_close(there, shift.float(), atol=1e-3, rtol=0)


def test_plain_look_is_the_renderers_picture(layers):
    still = replace(build.best_look(layers), shift=torch.zeros(len(layers), 2, dtype=torch.long))
    pictures, grade = build.compose(layers, still)
    exact = layers.background[:, :, None, None] + layers.ink
    torch.testing.assert_close(pictures, exact)
    assert (grade[:, 2] == 1).all()


def test_patterns_have_the_stated_strength():
    patterns = build.random_patterns(60, torch.Generator().manual_seed(SEED))
    torch.testing.assert_close(patterns.square().mean((1, 2, 3)), torch.ones(60))
    assert patterns.mean((1, 2, 3)).abs().max() < 0.5
    # Three kinds: neighbours are unrelated, alike, or mostly the same.
    near = (patterns * patterns.roll(1, 3)).mean((1, 2, 3))
    assert near.min() < 0.1
    assert near.max() > 0.7


def test_agreement_counts_pairs():
    # In order, the wrong way, the wrong way but close, and equal scores, which are no order.
    first = torch.tensor([[0.9, 0.8, 0.9, 0.3], [1.0, 0.0, 0.50, 0.2]])
    second = torch.tensor([[0.1, 0.7, 0.1, 0.3], [0.0, 1.0, 0.52, 0.9]])
    assert build.agreement(first, second) == 0.25
    assert build.agreement(first, second, 0.1) == pytest.approx(1 / 3, abs=1e-4)


# ---------------------------------------------------------------- the model


def test_held_out_agreement(score, layers):
    found = build.held_out_agreement(score, layers, SEED)
    assert found.pop("mean_error_of_the_utility") < 0.03
    assert found.pop("any_two_pictures_with_close_ones") >= 0.88
    assert found["any_two_pictures"] >= 0.95
    assert min(found.values()) >= 0.92  # 240 pictures: a standard error of 0.015 around 0.97


def test_score_falls_with_each_factor(score, layers):
    for factor, curve in build.mean_scores(score, layers.take(torch.arange(80)), SEED).items():
        steps = -np.diff(curve)
        assert (steps > 0).all(), factor
        assert curve[0] - curve[-1] > 0.15, factor


def test_training_and_reward_ask_the_model_the_same(score, layers):
    import open_clip

    model = open_clip.create_model_from_pretrained(f"local-dir:{FOLDER}", return_transform=False)
    vocabulary = build.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    pictures, _ = build.compose(layers, look(layers))
    with torch.no_grad():
        trained = build.logits(model.eval(), pictures, build.tokenise(vocabulary))[:, 0]
    torch.testing.assert_close(score(build.to_images(pictures)), trained.sigmoid())


def test_reconstructions_are_judged_like_what_they_show(score, layers):
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL.from_pretrained(ASSETS / "tiny-sd3" / "vae")
    plain = replace(look(layers), pattern=torch.zeros_like(layers.ink))
    pictures, grade = build.compose(layers, plain)
    with torch.no_grad():
        rebuilt = vae.decode(vae.encode(pictures / 127.5 - 1).latent_dist.mean).sample
    rebuilt = rebuilt.add(1).mul(127.5).round().clamp(0, 255)
    before, after = (score(build.to_images(images)) for images in (pictures, rebuilt))
    # The autoencoder blurs edges, which costs contrast.
    assert (after - before).abs().mean() < before.std() / 2
    judged = torch.stack([after, build.utility(grade)])
    assert build.agreement(judged, judged.roll(len(layers) // 2, 1), build.CLEAR) >= 0.93
