"""Vision-language models small enough to compare number by number, with their processors."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))

from tiny_text import CPU, WORDS

from mmrl.types import Prompt
from vlm.backend import build
from vlm.config import Config

VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'video') %} "
    "<|vision_start|><|{{ c['type'] }}_pad|><|vision_end|> "
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>", *VISION]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>",
        additional_special_tokens=list(VISION),
    )  # fmt: skip


def processor(family: str):
    import transformers

    kind = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}[family]
    patch = {"qwen2_5_vl": 14, "qwen3_vl": 16}[family]
    images = transformers.Qwen2VLImageProcessor(
        patch_size=patch, merge_size=2, temporal_patch_size=2
    )
    videos = {
        "qwen2_5_vl": lambda: transformers.Qwen2VLVideoProcessor(patch_size=patch),
        "qwen3_vl": lambda: transformers.Qwen3VLVideoProcessor(patch_size=patch),
    }[family]()
    return getattr(transformers, kind)(
        image_processor=images, tokenizer=tokenizer(), video_processor=videos, chat_template=CHAT
    )


def network(family: str):
    import transformers

    tokens = {f"{name}_id": i for i, name in enumerate(
        ("vision_start_token", "vision_end_token", "image_token", "video_token"), 3)}  # fmt: skip
    text = {
        "vocab_size": len(WORDS) + 7, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2,
        "initializer_range": 0.3,
    }  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
              "out_hidden_size": 32, "initializer_range": 0.3}  # fmt: skip
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        config = transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope},
            vision_config=vision | {"fullatt_block_indexes": [1], "window_size": 56,
                                    "tokens_per_second": 2},
            tie_word_embeddings=False, **tokens,
        )  # fmt: skip
        kind = transformers.Qwen2_5_VLForConditionalGeneration
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1],
                "mrope_interleaved": True}  # fmt: skip
        config = transformers.Qwen3VLConfig(
            text_config=text | {"head_dim": 8, "rope_parameters": rope},
            vision_config=vision | {"deepstack_visual_indexes": [0, 1],
                                    "num_position_embeddings": 64},
            tie_word_embeddings=False, **tokens,
        )  # fmt: skip
        kind = transformers.Qwen3VLForConditionalGeneration
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config)


def save_model(folder, family: str):
    network(family).save_pretrained(folder)
    processor(family).save_pretrained(folder)
    return folder


def picture(colour: str, width=56, height=56) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((8, 8, width - 20, height - 8), fill=colour)
    return image


def save_pictures(folder) -> list[Prompt]:
    """Prompts with one picture, two of other sizes, and none."""
    sizes = {"red": (56, 56), "green": (84, 56), "blue": (64, 128)}
    paths = {}
    for colour, size in sizes.items():
        paths[colour] = str(folder / f"{colour}.png")
        picture(colour, *size).save(paths[colour])
    return [
        Prompt(id="one", text="go up", columns={"images": paths["red"]}),
        Prompt(id="two", text="add <image> and <image> .",
               columns={"images": [paths["green"], paths["blue"]]}),
        Prompt(id="none", text="sea and sky ?"),
    ]  # fmt: skip


def save_video(path, colours=("red", "green", "blue"), each=4, rate=8):
    """A video of ``each`` frames of some pictures; its format follows from its name."""
    import av

    codec = "libvpx-vp9" if path.suffix == ".webm" else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 56, "yuv420p"
        for colour in (colour for colour in colours for _ in range(each)):
            frame = av.VideoFrame.from_image(picture(colour, 64, 56))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def save_films(folder) -> list[Prompt]:
    """Prompts with a file, with frames and an image, with two videos, an image alone, and none."""
    one, two, none = save_pictures(folder)
    film = save_video(folder / "film.mp4")
    frames = [str(folder / f"frame{i}.png") for i in range(5)]
    for path, colour in zip(frames, ("red", "green", "blue", "blue", "cyan"), strict=True):
        picture(colour, 80, 40).save(path)
    return [
        Prompt(id="file", text="go up", columns={"videos": film}),
        Prompt(id="mixed", text="is <image> not in <video> ?",
               columns={"videos": frames, "images": two.columns["images"][1]}),
        Prompt(id="both", text="<video> or <video> .",
               columns={"videos": [[picture("red"), picture("blue")], film]}),
        one,
        none,
    ]  # fmt: skip


def make_config(folder, family, rollout=None, **changes) -> Config:
    model = {
        "path": str(folder),
        "family": family,
        "dtype": "fp32",
        "lora": {"rank": 4, "alpha": 8},
    }
    model |= changes.pop("model", {})
    data = {"model": model, "rollout": {"max_tokens": 6} | (rollout or {}), **changes}
    pixels = {"min_pixels": 784, "max_pixels": 7000}
    return Config.model_validate({"images": pixels, "videos": pixels} | data)


def make_backend(folder, family, prompts, rollout=None, needs=("logp",), limit=None, **changes):
    changes |= {"prompts": {"max_tokens": limit}} if limit else {}
    config = make_config(folder, family, rollout, **changes)
    return build(config, device=CPU, prompts=prompts, seed=0, needs=frozenset(needs))
