"""CLIP score with a tiny open_clip model, against cosines computed here in float64."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmrl.errors import UserError
from rewards import _clip
from rewards._clip import located
from rewards.clip_score import Config, build

MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
    },
}
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
LOGIT_SCALE = 37.0
PROMPTS = ["a red square", "a blue dog", "noise", "nothing at all", "a red square"]


@pytest.fixture(scope="module")
def open_clip():
    try:
        import open_clip
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        pytest.skip(f"torch and torchvision are of different builds: {error}")
    return open_clip


@pytest.fixture(scope="module")
def model(open_clip):
    torch.manual_seed(0)
    model = open_clip.CLIP(**MODEL).eval()
    model.logit_scale.data.fill_(math.log(LOGIT_SCALE))
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-clip")
    config = {"model_cfg": MODEL, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (len(PROMPTS), 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in pixels]


def cosines(open_clip, model, images, mean, std):
    """One sample at a time, normalisation and cosine in numpy float64."""
    tokenizer, result = open_clip.SimpleTokenizer(context_length=16), []
    for prompt, image in zip(PROMPTS, images, strict=True):
        pixels = (np.asarray(image) / 255.0 - np.array(mean)) / np.array(std)
        with torch.no_grad():
            batch = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            a = model.encode_image(batch)[0].double().numpy()
            b = model.encode_text(tokenizer([prompt]))[0].double().numpy()
        result.append(float(a @ b / np.sqrt((a @ a) * (b @ b))))
    return np.array(result)


@pytest.mark.parametrize(
    ("scale", "factor"),
    [("cosine", 1.0), ("per30", LOGIT_SCALE / 30), ("per100", LOGIT_SCALE / 100)],
)
@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_folder(scale, factor, prefix, open_clip, model, folder, images):
    reward = build(Config(model_name=f"{prefix}{folder}", scale=scale, device="cpu", batch_size=2))
    scores = reward(PROMPTS, images, text=["ignored"] * len(PROMPTS))
    expected = factor * cosines(open_clip, model, images, MEAN, STD)
    assert scores.dtype == torch.float32
    # float32 through two one-layer transformers; cosines here spread over more than 0.1
    np.testing.assert_allclose(scores.numpy(), expected, atol=2e-5)
    assert np.ptp(expected) > 0.05


@pytest.fixture(scope="module")
def name(open_clip, tmp_path_factory):
    """The tiny architecture under a name that open_clip knows."""
    path = tmp_path_factory.mktemp("configs") / "tiny-test-clip.json"
    path.write_text(json.dumps(MODEL))
    open_clip.add_model_config(path)
    return path.stem


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_registered_name_with_local_weights(suffix, open_clip, name, model, images, tmp_path):
    weights = tmp_path / f"weights.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(model.state_dict(), weights)
    reward = build(Config(model_name=name, pretrained=str(weights)))
    openai = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = cosines(open_clip, model, images, *openai)
    np.testing.assert_allclose(reward(PROMPTS, images).numpy(), expected, atol=2e-5)


class Bomb:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (sys.exit, ("code ran while loading weights",))


def test_pickled_code_is_not_run(name, images, tmp_path):
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pt")
    reward = build(Config(model_name=name, pretrained=str(tmp_path / "bomb.pt")))
    with pytest.raises(UserError, match=r"(?i)weights.only"):
        reward(PROMPTS, images)


def test_unknown_name_and_tag(open_clip, images):
    with pytest.raises(UserError, match="did you mean 'ViT-B-32'"):
        build(Config(model_name="ViT-B-3Z"))(PROMPTS, images)
    with pytest.raises(UserError, match="no-such-tag"):
        build(Config(model_name="ViT-B-32", pretrained="no-such-tag"))(PROMPTS, images)


def test_import_failure_is_explained(monkeypatch, images):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    _clip.loaded.cache_clear()
    with pytest.raises(UserError, match="torchvision"):
        build(Config())(PROMPTS, images)


def test_paths_are_checked_when_building(tmp_path):
    for name in (f"{tmp_path}/missing", f"local-dir:{tmp_path}", str(tmp_path)):
        with pytest.raises(UserError, match="no open_clip_config"):
            build(Config(model_name=name))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"no \.safetensors"):
        build(Config(model_name=str(tmp_path)))
    for weights in (f"{tmp_path}/missing.pt", "missing.safetensors"):
        with pytest.raises(UserError, match="no such file"):
            build(Config(pretrained=weights))
    with pytest.raises(UserError, match="brings its own weights"):
        build(Config(model_name=str(tmp_path), pretrained="openai"))
    with pytest.raises(UserError, match="no torch device"):
        build(Config(device="abacus"))


def test_defaults_of_the_weights():
    assert located("ViT-L-14", None) == ("ViT-L-14", "openai")
    assert located("ViT-L-14", "laion2b_s32b_b82k") == ("ViT-L-14", "laion2b_s32b_b82k")
    assert located("hf-hub:owner/name", None) == ("hf-hub:owner/name", None)
