"""Language models of full size with random weights in the backend that trains, for gpu_language.

There is no tokenizer and no processor: prompts are random tokens, with a random image before them
where the model reads images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from mmrl.attention import Availability
from mmrl.resolve import resolve
from mmrl.rollouts import make_requests as requests_of
from mmrl.text.attention import NAME, register
from mmrl.text.backend import TextBackend
from mmrl.text.config import Config
from mmrl.text.layout import Encoded, Row
from mmrl.text.loading import LORA_TARGETS, prepare
from mmrl.types import DTYPES, Prompt, RolloutRequest
from mmrl.weights import trainable

IMAGE, VISION_START, VISION_END = 1, 2, 3
FIRST_WORD = 4
"""Smaller token ids of our own stand for an image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Size:
    """A network, its group ``group`` of completions and the tokens of a ``prompt`` and, on average,
    of a ``completion``; the matmul of the floor.

    ``name``: whose size it is.  ``kind``: a configuration of transformers.  ``patches``: of an
    image, a side, where the prompt has one.
    """

    name: str
    kind: str
    network: dict[str, Any]
    patches: int = 0
    prompt: int = 400
    completion: int = 512
    group: int = 8
    rank: int = 32
    matmul: tuple[int, int, int] = (8192, 8192, 8192)

    @property
    def text(self) -> dict[str, Any]:
        """The language model's part of ``network``."""
        return self.network.get("text_config", self.network)

    @property
    def head_width(self) -> int:
        """Of one attention head."""
        heads = self.text["num_attention_heads"]
        return self.text.get("head_dim") or self.text["hidden_size"] // heads


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to run the same training."""

    tuning: str = "lora"
    update: str = "shared_prompt"
    attention: str = "sdpa"
    checkpointing: bool = False
    dtype: str = "bf16"


ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
IMAGE_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 0,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
QWEN3_4B = Size(
    name="Qwen3-4B",
    kind="Qwen3Config",
    network=ENDLESS
    | {
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
)
QWEN25_VL_3B = Size(
    name="Qwen2.5-VL-3B",
    kind="Qwen2_5_VLConfig",
    network=IMAGE_TOKENS
    | {
        "tie_word_embeddings": True,
        "text_config": ENDLESS
        | {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "window_size": 112,
        },
    },
    patches=32,  # 448 x 448 pixels, 256 of the prompt's tokens
)
TINY_TEXT = ENDLESS | {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,  # flex takes no narrower ones
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SMALL: dict[str, Any] = {"completion": 6, "group": 4, "rank": 2, "matmul": (64, 64, 64)}
TOY_TEXT = Size(
    name="a toy",
    kind="Qwen3Config",
    network=TINY_TEXT,
    prompt=5,
    **SMALL,
)
TOY_VL = Size(
    name="a toy",
    kind="Qwen2_5_VLConfig",
    network=IMAGE_TOKENS
    | {
        "tie_word_embeddings": True,
        "text_config": TINY_TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 4],
            }
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
            "window_size": 56,
        },
    },
    patches=4,
    prompt=10,
    **SMALL,
)
SIZES = {"qwen3-4b": QWEN3_4B, "qwen2.5-vl-3b": QWEN25_VL_3B}
TOYS = {"qwen3-4b": TOY_TEXT, "qwen2.5-vl-3b": TOY_VL}


def make_config(size: Size, variant: Variant, groups: int = 1) -> Config:
    """The ``backend`` section; all completions of a rollout grow side by side."""
    lora = {"rank": size.rank, "alpha": 2 * size.rank} if variant.tuning == "lora" else None
    model = {
        "path": "-",
        "dtype": variant.dtype,
        "lora": lora,
        "attention": variant.attention,
        "gradient_checkpointing": variant.checkpointing,
    }
    rollout = {"max_tokens": size.completion, "batch_size": groups * size.group}
    return Config.model_validate({"model": model, "rollout": rollout, "update": variant.update})


def random_network(size: Size, variant: Variant, device: torch.device) -> Any:
    """A network with seeded random weights, adapted or whole, as ``load_network`` makes it."""
    import transformers

    register()
    config, vision = make_config(size, variant), bool(size.patches)
    kernel: Any = NAME if variant.update != "padded" else "sdpa"
    kernel = {"text_config": kernel, "vision_config": "sdpa", "": "sdpa"} if vision else kernel
    loader = getattr(
        transformers, "AutoModelForImageTextToText" if vision else "AutoModelForCausalLM"
    )
    dtype = DTYPES[variant.dtype] if config.model.lora else torch.float32
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(0)
        described = getattr(transformers, size.kind)(**size.network)
        network = loader.from_config(described, dtype=dtype, attn_implementation=kernel)
    with torch.device(device):
        prepare(network, config.model, 0, _targets(size))
    if vision:
        resolve("vision_models", "qwen2_5_vl").load.freeze_vision(network)
    return network.to(device)


def _targets(size: Size) -> Sequence[str] | str:
    family = resolve("vision_models", "qwen2_5_vl").load
    return family.lora_targets(train_vision=False) if size.patches else LORA_TARGETS


def build_backend(
    size: Size, variant: Variant, device: torch.device, groups: int = 1
) -> TextBackend:
    """The training backend around a random network, for ``make_requests``."""
    network = random_network(size, variant, device)
    assert trainable(network)
    return TextBackend(
        make_config(size, variant, groups),
        network,
        SimpleNamespace(eos_token_id=None, decode=lambda ids, **options: ""),
        {str(i): random_prompt(size, i) for i in range(groups)},
        keeps_reference=False,
        attention=Availability(variant.attention, True, "measured"),
        forbidden=(IMAGE, VISION_START, VISION_END) if size.patches else (),
    )


def make_requests(size: Size, groups: int, step: int) -> list[RolloutRequest]:
    """A group for each of ``groups`` prompts."""
    prompts = [Prompt(id=str(i), text="") for i in range(groups)]
    return requests_of(prompts, size.group, 0, step)


@cache
def random_prompt(size: Size, number: int) -> Encoded:
    """Random tokens, behind the marks and the pixels of a random image where there is one."""
    generator = torch.Generator().manual_seed(number)
    if not size.patches:
        return Encoded.of_text(_words(size, size.prompt, generator))
    merged = size.patches**2 // 4
    image = [VISION_START, *[IMAGE] * merged, VISION_END]
    ids = torch.tensor([[*image, *_words(size, size.prompt - len(image), generator)]])
    grid = torch.tensor([[1, size.patches, size.patches]])
    found = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": grid,
    }
    meta = random_network(size, Variant(), torch.device("meta"))
    positions, after = resolve("vision_models", "qwen2_5_vl").load(meta).positions(found)
    vision = meta.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(size.patches**2, width, generator=generator)
    inputs = {"pixel_values": pixels, "image_grid_thw": grid}
    return Encoded(ids=ids[0].tolist(), positions=positions, after=after, inputs=inputs)


def random_rows(size: Size, groups: int) -> list[Row]:
    """Samples of ``groups`` prompts; in each, lengths from half to one and a half of the average.

    They are spread evenly, so their mean is the average but for rounding.
    """
    half = size.completion / 2
    lengths = [round(half + 2 * half * i / (size.group - 1)) for i in range(size.group)]
    generator = torch.Generator().manual_seed(groups)
    return [
        Row(prompt=random_prompt(size, i), completion=_words(size, length, generator))
        for i in range(groups)
        for length in lengths
    ]


def _words(size: Size, count: int, generator: torch.Generator) -> list[int]:
    vocabulary = size.text["vocab_size"]
    return torch.randint(FIRST_WORD, vocabulary, (count,), generator=generator).tolist()
