"""Random-weight models, prompts and completions for language_update; their tokens are words.

A modality is a model and prompts that it reads: a Qwen3 and words, or a Qwen3-VL and words after a
picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

PAD = 0
VISION = {"vision_start": 1, "vision_end": 2, "image": 3, "video": 4}
END = 5
NAMES = ("<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<end>")
"""Of the first tokens."""
MEAN_LENGTH, MAX_LENGTH = 64, 96
PATCH, MERGE = 16, 2
"""Pixels of a patch, and patches of a token, along a side."""
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
"""Of the language model."""
TOWER = {
    "depth": 2,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_heads": 4,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}
"""Sizes of what reads pictures."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Tokens of the prompt, a picture's included, and of the vocabulary; ``trained``: adapters, or
    every parameter of the language model; ``modality``: of ``MODALITIES``; ``seed``: of weights,
    prompt, completions and advantages.
    """

    prompt: int
    vocabulary: int
    trained: str = "lora"
    modality: str = "text"
    seed: int = 0

    def generator(self, number: int) -> torch.Generator:
        """A fresh one for each ``number`` below 1000, and others for another ``seed``."""
        return torch.Generator().manual_seed(1000 * self.seed + number)


@dataclass(frozen=True, kw_only=True)
class Work:
    """A group: token ids of its completions, and their advantages."""

    completions: Sequence[Sequence[int]]
    advantages: Sequence[float]

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return sum(len(ids) for ids in self.completions)


class Modality(Protocol):
    """What differs between models that see and models that do not.

    ``BACKEND``: of mmrl's configuration, beside what all have.  ``BANNED``: token ids that mmrl
    never samples.
    """

    BACKEND: ClassVar[dict[str, Any]]
    BANNED: ClassVar[list[int]]

    def make(self, tokenizer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """A network with ``options`` for its language model, and the processor of its prompts."""
        ...

    def load(self, folder: Path) -> Any:
        """The network in float32, with gradients where mmrl has them."""
        ...

    def prompt(self, shape: Shape, folder: Path) -> dict[str, str]:
        """Columns of a prompt as mmrl reads them; files that they name are written."""
        ...

    def row(self, prompt: dict[str, str]) -> dict[str, Any]:
        """The same as TRL reads it."""
        ...

    def read(self, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``prompt_ids`` [G, P] of TRL's rows, and what else its loss wants of a prompt."""
        ...


class Text:
    """A Qwen3; see ``Modality``."""

    BACKEND: ClassVar = {"name": "text", "model": {}}
    BANNED: ClassVar[list[int]] = []

    def make(self, tokenizer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """See ``Modality``."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        return Qwen3ForCausalLM(Qwen3Config(**options)), tokenizer

    def load(self, folder: Path) -> Any:
        """See ``Modality``."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def prompt(self, shape: Shape, folder: Path) -> dict[str, str]:
        """See ``Modality``."""
        return {"prompt": _text(shape, shape.prompt)}

    def row(self, prompt: dict[str, str]) -> dict[str, Any]:
        """See ``Modality``."""
        return dict(prompt)

    def read(self, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """See ``Modality``."""
        found = processor([row["prompt"] for row in rows], return_tensors="pt")
        return {"prompt_ids": found["input_ids"]}


class Vision:
    """A Qwen3-VL, whose tower stays as it is, and a square picture as large as leaves room for a
    word; see ``Modality``.
    """

    BACKEND: ClassVar = {
        "name": "vlm",
        "model": {"family": "qwen3_vl"},
        "images": {"min_pixels": 1},
    }
    BANNED: ClassVar = list(VISION.values())
    CHAT: ClassVar = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )

    def make(self, tokenizer: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """See ``Modality``."""
        import transformers

        rope = {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 4, 4],
            "mrope_interleaved": True,
        }
        ids: dict[str, Any] = {f"{name}_token_id": token for name, token in VISION.items()}
        config = transformers.Qwen3VLConfig(
            text_config=options | {"rope_parameters": rope},
            vision_config=TOWER | {"out_hidden_size": options["hidden_size"]},
            tie_word_embeddings=True,
            **ids,
        )
        processor = transformers.Qwen3VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(
                patch_size=PATCH, merge_size=MERGE, min_pixels=1
            ),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen3VLVideoProcessor(patch_size=PATCH),
            chat_template=self.CHAT,
        )
        return transformers.Qwen3VLForConditionalGeneration(config), processor

    def load(self, folder: Path) -> Any:
        """See ``Modality``."""
        from transformers import AutoModelForImageTextToText

        network = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        network.model.visual.requires_grad_(False)
        return network

    def prompt(self, shape: Shape, folder: Path) -> dict[str, str]:
        """See ``Modality``.  ``SystemExit`` if no picture fits into so few tokens."""
        from PIL import Image

        around = 2  # tokens: where vision starts and ends
        if shape.prompt < around + 2:
            raise SystemExit(f"{shape.prompt} tokens have no room for a picture and a word")
        side = math.isqrt(shape.prompt - around - 1)
        size = (side * MERGE * PATCH, side * MERGE * PATCH, 3)
        pixels = torch.randint(256, size, generator=shape.generator(0), dtype=torch.uint8)
        path = folder / f"picture-{side}.png"
        Image.fromarray(pixels.numpy()).save(path)
        return {"prompt": _text(shape, shape.prompt - around - side**2), "images": str(path)}

    def row(self, prompt: dict[str, str]) -> dict[str, Any]:
        """See ``Modality``."""
        from PIL import Image

        parts = [{"type": "image"}, {"type": "text", "text": prompt["prompt"]}]
        return {
            "prompt": [{"role": "user", "content": parts}],
            "images": [Image.open(prompt["images"]).convert("RGB")],
        }

    def read(self, processor: Any, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """See ``Modality``."""
        texts = processor.apply_chat_template([row["prompt"] for row in rows], tokenize=False)
        found = processor(text=texts, images=[row["images"] for row in rows], return_tensors="pt")
        names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
        return {"prompt_ids": found["input_ids"], **{name: found[name] for name in names}}


MODALITIES: dict[str, Modality] = {"text": Text(), "vlm": Vision()}


def make_model(folder: Path, shape: Shape, **changes: Any) -> None:
    """Write a random-weight model and the processor of its prompts; ``changes``: of ``SIZES``.

    Enough tokens end a completion for samples of the model to have ``MEAN_LENGTH`` tokens, were
    they not cut at ``MAX_LENGTH``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    words = {word(i): i for i in range(shape.vocabulary)}
    inner = Tokenizer(models.WordLevel(words, unk_token=word(PAD)))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=word(PAD),
        unk_token=word(PAD),
        eos_token=word(END),
        additional_special_tokens=[word(token) for token in VISION.values()],
    )
    options = {
        **SIZES | changes,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.prompt + MAX_LENGTH,
        "tie_word_embeddings": True,
        "pad_token_id": PAD,
        "eos_token_id": END,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(shape.seed)
        network, processor = MODALITIES[shape.modality].make(tokenizer, options)
    network.generation_config.eos_token_id = list(range(END, _first_word(shape)))
    logging.disable_progress_bar()
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


def word(token: int) -> str:
    """The text of a token of the toy; none is the beginning of a special one."""
    return NAMES[token] if token < len(NAMES) else f"w{token}"


def make_work(shape: Shape, group_size: int) -> Work:
    """Random completions, from half to one and a half times ``MEAN_LENGTH`` long."""
    lengths = torch.linspace(MEAN_LENGTH // 2, MAX_LENGTH, group_size).long().tolist()
    return Work(
        completions=[_tokens(shape, n, number=2 + i) for i, n in enumerate(lengths)],
        advantages=torch.randn(group_size, generator=shape.generator(0)).tolist(),
    )


def _text(shape: Shape, count: int) -> str:
    return " ".join(word(token) for token in _tokens(shape, count, number=1))


def _tokens(shape: Shape, count: int, number: int) -> list[int]:
    low, high = _first_word(shape), shape.vocabulary
    return torch.randint(low, high, (count,), generator=shape.generator(number)).tolist()


def _first_word(shape: Shape) -> int:
    """Behind the tokens that end a completion."""
    return END + max(1, shape.vocabulary // MEAN_LENGTH)
