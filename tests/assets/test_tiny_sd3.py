"""The shipped tiny SD3 pipeline: checksums, size, classes, and one drawn image."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection, T5EncoderModel

ASSETS = Path(__file__).resolve().parents[2] / "assets"
FOLDER = ASSETS / "tiny-sd3"
TEXT_LENGTH = 10


@pytest.fixture(scope="module")
def manifest() -> dict:
    return json.loads((ASSETS / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rows(name: str) -> list[dict]:
    """The lines of one prompt file."""
    text = (ASSETS / "prompts" / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_manifest_lists_every_file_with_its_checksum(manifest):
    for name, entry in manifest["files"].items():
        data = (ASSETS / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        assert len(data) == entry["bytes"], name
    shipped = {
        p.relative_to(ASSETS).as_posix()
        for part in ("tiny-sd3", "prompts")
        for p in (ASSETS / part).rglob("*")
        # Other prompts are not made with the pipeline.
        if p.is_file() and (part == "tiny-sd3" or p.name.startswith(("ocr-", "composition-")))
    }
    assert shipped <= set(manifest["files"])


@pytest.mark.parametrize(
    ("task", "key"), [("ocr", "base_accuracy"), ("composition", "composition_base_accuracy")]
)
def test_manifest_accuracy_lies_in_the_band(manifest, task, key):
    accuracy = manifest[key]
    assert accuracy["images"] >= 200
    assert 0.35 <= accuracy["overall"] <= 0.65
    assert manifest[f"{task}_ground_truth"] >= 0.99
    assert manifest[f"{task}_reconstructions"] >= 0.97


def test_folder_is_small_half_precision_safetensors():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12 * 2**20
    assert {p.suffix for p in files} <= {".json", ".txt", ".safetensors"}
    for path in (p for p in files if p.suffix == ".safetensors"):
        with path.open("rb") as handle:
            head = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        assert {v["dtype"] for k, v in head.items() if k != "__metadata__"} <= {"F16", "I64"}


def test_component_classes(pipe):
    assert isinstance(pipe.transformer, SD3Transformer2DModel)
    assert isinstance(pipe.vae, AutoencoderKL)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    assert isinstance(pipe.text_encoder, CLIPTextModelWithProjection)
    assert isinstance(pipe.text_encoder_2, CLIPTextModelWithProjection)
    assert isinstance(pipe.text_encoder_3, T5EncoderModel)
    assert pipe.scheduler.config.shift == 3.0
    assert 1e6 <= sum(p.numel() for p in pipe.transformer.parameters()) <= 3e6
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        assert part.dtype == torch.float32
    for name in ("tokenizer", "tokenizer_2"):
        assert (FOLDER / name / "vocab.json").exists()
        assert (FOLDER / name / "merges.txt").exists()


def test_prompts_train_and_evaluation_are_disjoint(manifest):
    train, held = rows("ocr-train.jsonl"), rows("ocr-eval.jsonl")
    assert len(held) >= 64
    assert len(train) >= 200
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    assert len({r["prompt"] for r in train + held}) == len(train) + len(held)
    assert all(r["prompt"].split('"')[1] == r["text"] for r in train + held)
    unseen = set(manifest["held_out"]["numbers_never_trained"])
    assert unseen
    assert not unseen & {r["text"] for r in train}
    assert unseen <= {r["text"] for r in held}


def test_tokenizers_spell_the_quoted_text(pipe):
    for row in rows("ocr-train.jsonl") + rows("ocr-eval.jsonl"):
        for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
            tokens = tokenizer.convert_ids_to_tokens(tokenizer(row["prompt"]).input_ids)
            assert len(tokens) <= tokenizer.model_max_length == TEXT_LENGTH
            first, last = (i for i, t in enumerate(tokens) if t == '"</w>')
            spelt = [t.removesuffix("</w>") for t in tokens[first + 1 : last]]
            assert spelt == list(row["text"].lower())


def draw(pipe: StableDiffusion3Pipeline, **call):
    """Draw one prompt with a fixed seed."""
    return pipe(
        'a red sign "42"',
        generator=torch.Generator().manual_seed(0),
        guidance_scale=1.0,
        max_sequence_length=TEXT_LENGTH,
        output_type="np",
        **call,
    ).images


def test_draws_an_image_and_a_default_size_works(pipe):
    first = draw(pipe, height=32, width=64, num_inference_steps=4)
    assert first.shape == (1, 32, 64, 3)
    assert (first == draw(pipe, height=32, width=64, num_inference_steps=4)).all()
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    assert draw(pipe, num_inference_steps=1).shape == (1, side, side, 3)


def test_t5_is_silent_and_never_truncates(pipe):
    prompts = [r["prompt"] for r in rows("ocr-train.jsonl") + rows("ocr-eval.jsonl")]
    assert max(len(ids) for ids in pipe.tokenizer_3(prompts).input_ids) <= TEXT_LENGTH
    embeddings = pipe._get_t5_prompt_embeds(prompts[:4], max_sequence_length=TEXT_LENGTH)
    assert embeddings.shape == (4, TEXT_LENGTH, pipe.transformer.config.joint_attention_dim)
    assert not embeddings.any()


def test_build_script_computes_the_pipelines_text_embeddings(pipe):
    build = pytest.importorskip("assets.build_tiny_sd3", reason="the build script needs rapidocr")
    models = {"text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    prompts = ['a red sign "42"', 'a purple sign "CAT"', "two red circles and a blue square"]
    ids = build.tokenise(pipe.tokenizer, prompts)
    with torch.no_grad():
        ours = build.encode_text(models, ids, TEXT_LENGTH)
        theirs = pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH
        )
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[2])


def test_build_script_splits_the_shipped_prompts(manifest):
    task = pytest.importorskip("assets.ocr_task", reason="the build script needs rapidocr")
    train, held, unseen = task.split_prompts(manifest["seed"])
    assert task.tuning_prompts(train, manifest["seed"]) == rows("ocr-train.jsonl")
    assert held == rows("ocr-eval.jsonl")
    assert unseen == manifest["held_out"]["numbers_never_trained"]
