"""What every model family shares: encoded prompts, loading, image sizes, time shifts and export.

A family is one module.  It holds a subclass of ``Family``, under the name ``load``, and
``LORA_TARGETS``.  The class methods that need no weights stand beside it as functions:
``latent_shape`` (of the class, ``latent_shape_of``), ``image_tokens``, ``meta_transformer``,
``parameter_count`` and ``save_lora``.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from diffusion.attention import apply_attention
from mmrl.errors import UserError

ENCODE_BATCH = 32

ATTENTION_PROJECTIONS = tuple(
    "attn." + name
    for name in "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
)
"""Endings of the linear layers of joint attention, image side and text side."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Encoded prompts.

    ``text`` [B, S, D]: token embeddings.  ``pooled`` [B, P]: embedding of the whole prompt, where
    the family has one.  ``mask`` [B, S] bool: false for padding; ``None``: there is none.
    """

    text: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    @staticmethod
    def stack(rows: Sequence[Condition], device: torch.device) -> Condition:
        """One batch of several, on ``device``; shorter texts are padded with masked zeros."""
        length = max(row.text.shape[1] for row in rows)
        text = torch.cat([pad(row.text, (0, 0, 0, length - row.text.shape[1])) for row in rows])
        pooled = [row.pooled for row in rows if row.pooled is not None]
        padded = any(row.mask is not None or row.text.shape[1] < length for row in rows)
        masks = [pad(row.present(), (0, length - row.text.shape[1])) for row in rows]
        return Condition(
            text=text.to(device),
            pooled=torch.cat(pooled).to(device) if pooled else None,
            mask=torch.cat(masks).to(device) if padded else None,
        )

    def repeat(self, times: int) -> Condition:
        """The whole batch ``times`` times over, one after another."""
        return Condition(
            text=self.text.repeat(times, 1, 1),
            pooled=None if self.pooled is None else self.pooled.repeat(times, 1),
            mask=None if self.mask is None else self.mask.repeat(times, 1),
        )

    def present(self) -> Tensor:
        """[B, S] bool: which tokens are no padding."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.text.shape[:2], dtype=torch.bool, device=self.text.device)

    def rows(self) -> list[Condition]:
        """Each prompt alone, on the CPU, without its padding."""
        present, pooled = self.present(), self.pooled
        return [
            Condition(
                text=self.text[row, present[row]].unsqueeze(0).cpu(),
                pooled=None if pooled is None else pooled[row : row + 1].clone().cpu(),
            )
            for row in range(len(self.text))
        ]


class Family(ABC):
    """The parts of a diffusers pipeline that training uses.

    ``PIPELINE`` and ``TRANSFORMER`` are names of diffusers classes, ``GUIDANCE_ARGUMENT`` is what
    the pipeline calls the strength of guidance.  Latents are [B, C, h, w]
    everywhere outside, whatever a transformer packs them into.
    """

    PIPELINE: ClassVar[str]
    TRANSFORMER: ClassVar[str]
    GUIDANCE_ARGUMENT: ClassVar[str] = "guidance_scale"

    def __init__(
        self, folder: Path, dtype: torch.dtype, transformer_dtype: torch.dtype, device: torch.device
    ) -> None:
        """Load onto ``device``; ``UserError`` if diffusers cannot read the folder."""
        self._pipeline: Any = load_pipeline(self.PIPELINE, folder, dtype, transformer_dtype)
        self._pipeline.to(device)
        self.transformer: Any = self._pipeline.transformer
        self._vae: Any = self._pipeline.vae.requires_grad_(False).eval()
        self.device = device

    @property
    def embeds_guidance(self) -> bool:
        """Whether ``velocity`` is guided by its own input, so that guiding costs no second one."""
        return False

    def use_attention(self, name: str, network: Any) -> None:
        """Make ``network``, a transformer of this family, use a kernel of ``attention``."""
        apply_attention(network, name)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], max_sequence_length: int) -> list[Condition]:
        """One encoded prompt each, on the CPU, without padding that can be left out."""
        encoded: list[Condition] = []
        for start in range(0, len(prompts), ENCODE_BATCH):
            batch = list(prompts[start : start + ENCODE_BATCH])
            encoded += self.encode_batch(batch, max_sequence_length).rows()
        return encoded

    @abstractmethod
    def encode_batch(self, prompts: list[str], max_sequence_length: int) -> Condition:
        """A batch as the pipeline encodes it."""

    def release_encoders(self) -> None:
        """Free the text encoders; ``encode`` does not work afterwards."""
        for name in self._pipeline.components:
            if name.startswith("text_encoder"):
                setattr(self._pipeline, name, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """[C, h, w] of the latents of an image; ``UserError`` if the size does not fit."""
        config, scale = self.transformer.config, self._pipeline.vae_scale_factor
        return self.latent_shape_of(config, scale, height, width)

    def shift(self, height: int | None, width: int | None) -> float | None:
        """Time shift that the pipeline derives from the image size; ``None``: from no size."""
        tokens = self.image_tokens(self.transformer.config, self.latent_shape(height, width))
        return scheduler_shift(self._pipeline.scheduler.config, tokens)

    @property
    def shift_terminal(self) -> float | None:
        """Level above 0 at which the pipeline's scheduler makes its grid end, if it does."""
        # Some files say false, which means the same as null.
        return self._pipeline.scheduler.config.get("shift_terminal") or None

    @abstractmethod
    def velocity(
        self,
        network: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        condition: Condition,
        guidance: float,
    ) -> Tensor:
        """dx/dsigma at ``latents`` [B, C, h, w] and levels ``sigma`` [B], float32.

        ``network`` is the transformer, or accelerate's wrapper of it.  ``guidance`` counts only
        where ``embeds_guidance``.
        """

    def guide(self, without: Tensor, with_prompt: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) of two velocities."""
        return without + guidance * (with_prompt - without)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """PIL images of clean latents [B, C, h, w]."""
        pixels = self.decode_pixels(latents)
        return self._pipeline.image_processor.postprocess(pixels, output_type="pil")

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] of clean latents, by an ``AutoencoderKL``."""
        vae = self._vae.config
        scaled = latents / vae.scaling_factor + vae.shift_factor
        return self._vae.decode(scaled.to(self._vae.dtype), return_dict=False)[0]

    @classmethod
    @abstractmethod
    def latent_shape_of(
        cls, config: Any, scale: int, height: int | None, width: int | None
    ) -> tuple[int, int, int]:
        """[C, h, w] for a transformer's ``config`` and ``scale`` pixels for each latent.

        ``UserError`` if ``height`` or ``width`` (pixels; null: the pipeline's default) do not fit.
        """

    @classmethod
    @abstractmethod
    def image_tokens(cls, config: Any, shape: tuple[int, int, int]) -> int:
        """Length of the sequence that the transformer makes of latents of ``shape`` [C, h, w]."""

    @classmethod
    def meta_transformer(cls, folder: Path) -> Any:
        """The transformer without weights (meta device), from its configuration alone."""
        import diffusers

        source = read_json(folder, "transformer", "config.json")
        with torch.device("meta"):
            return getattr(diffusers, cls.TRANSFORMER).from_config(source)

    @classmethod
    def parameter_count(cls, folder: Path) -> int:
        """Parameters of the transformer; loads no weights."""
        return sum(parameter.numel() for parameter in cls.meta_transformer(folder).parameters())

    @classmethod
    def save_lora(cls, folder: Path, state: dict[str, Any], lora: dict[str, Any]) -> None:
        """Write ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``.

        ``lora``: the peft configuration; without it in the file the reader would take alpha = rank.
        """
        import diffusers

        getattr(diffusers, cls.PIPELINE).save_lora_weights(
            str(folder), transformer_lora_layers=state, transformer_lora_adapter_metadata=lora
        )


def load_pipeline(
    name: str, folder: Path, dtype: torch.dtype, transformer_dtype: torch.dtype
) -> Any:
    """A pipeline of diffusers class ``name``; ``UserError`` if it cannot be read."""
    import diffusers

    # diffusers wants to be told again about parts that the index itself says are absent.
    index = read_json(folder, "model_index.json")
    absent = {part: None for part, source in index.items() if source == [None, None]}
    dtypes = {"default": dtype, "transformer": transformer_dtype}
    kind = getattr(diffusers, name)
    try:
        pipeline = kind.from_pretrained(str(folder), dtype=dtypes, **absent)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"model.path: cannot load a pipeline from {folder}: {error}") from error
    for part_name, part in pipeline.components.items():  # older diffusers ignored the argument
        wanted = dtypes.get(part_name, dtype)
        if isinstance(part, nn.Module) and part.dtype != wanted:
            part.to(wanted)
    return pipeline


def shift_exponent(
    length: int,
    base: int = 256,
    max: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """mu of an image of ``length`` tokens: linear, through the shifts at ``base`` and ``max``."""
    return base_shift + (length - base) * (max_shift - base_shift) / (max - base)


def dynamic_shift(
    length: int,
    base: int = 256,
    max: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """Time shift s = e^mu of an image of ``length`` tokens, by default FLUX's."""
    return math.exp(shift_exponent(length, base, max, base_shift, max_shift))


def scheduler_shift(scheduler: Mapping[str, Any], tokens: int) -> float | None:
    """The shift that diffusers derives from ``tokens``; ``None`` if it is a constant.

    ``scheduler``: the configuration of a ``FlowMatchEulerDiscreteScheduler``.
    """
    if not scheduler.get("use_dynamic_shifting", False):
        return None
    is_exponential = scheduler.get("time_shift_type", "exponential") == "exponential"
    rule = dynamic_shift if is_exponential else shift_exponent
    return rule(
        tokens,
        scheduler.get("base_image_seq_len", 256),
        scheduler.get("max_image_seq_len", 4096),
        scheduler.get("base_shift", 0.5),
        scheduler.get("max_shift", 1.15),
    )


def pixel_sizes(
    height: int | None, width: int | None, default: int, step: int, limit: int | None = None
) -> tuple[int, int]:
    """Height and width; ``UserError`` if one is no multiple of ``step`` up to ``limit`` pixels."""
    sizes = {"height": height or default, "width": width or default}
    for name, size in sizes.items():
        if size % step or (limit is not None and size > limit):
            up_to = "" if limit is None else f" up to {limit}"
            raise UserError(
                f"rollout.{name} = {size} does not fit this model; "
                f"allowed: multiples of {step}{up_to}"
            )
    return sizes["height"], sizes["width"]


def locate(path: str, *, weights: bool) -> Path:
    """The local folder of a pipeline; a hub id is fetched into the hub's cache.

    ``weights``: also fetch safetensors, not only configurations and tokenizers.  ``UserError`` if
    there is no such folder, it is no pipeline, or the hub cannot serve it.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not is_hub_id(path):
            raise UserError(f"model.path = {path!r} does not exist (from {Path.cwd()})")
        folder = _download(path, weights)
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path = {path!r} is not a diffusers pipeline: it has no model_index.json"
        )
    return folder


def quiet_libraries() -> None:
    """No progress bar for each file that is read."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def read_json(folder: Path, *parts: str) -> dict[str, Any]:
    """A configuration file of a pipeline; ``UserError`` if it is missing or malformed."""
    file = folder.joinpath(*parts)
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: cannot read {file}: {error}") from error


def vae_scale_factor(folder: Path) -> int:
    """Pixels for each latent, from the autoencoder's configuration."""
    vae = read_json(folder, "vae", "config.json")
    halvings: Iterable[Any] = vae.get("temperal_downsample") or vae["block_out_channels"][1:]
    return 2 ** len(list(halvings))


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder names a model on a hub."""
    # assets/x looks like an id as well; where the first part is a folder, the path was meant.
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path)) and not Path(path).parent.exists()


def _download(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*/*.txt", "*/*.model"] + ["*/*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, authorisation, unknown id: the hub says which
        raise UserError(
            f"model.path = {name!r} is no local folder, and the hub refused it: {error}"
        ) from error
