"""Loading CLIP models with open_clip, and embedding images and texts with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import normalize

from mmrl.errors import UserError
from mmrl.schema import StrictModel, nearest

LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
# open_clip takes OpenAI's own spellings, such as ViT-B/32; no other name of a model has a slash.
NAME_WITH_SLASH = re.compile(r"ViT-[A-Za-z]+/\d+")
# What open_clip, safetensors and torch raise on files that are missing, cut off or of another kind.
LOAD_ERRORS = (
    RuntimeError,
    OSError,
    ValueError,
    TypeError,
    LookupError,
    SafetensorError,
    UnpicklingError,
)


class ClipConfig(StrictModel):
    """Which CLIP model, where it runs, and how many images it takes at once."""

    model_name: str = Field(
        default="ViT-L-14",
        min_length=1,
        description="an open_clip model name, a folder with open_clip_config.json and weights "
        "(plain or as local-dir:PATH), or hf-hub:OWNER/NAME",
    )
    pretrained: str | None = Field(
        default=None,
        description="tag or local file of the weights of a named model; null: openai. A folder or "
        "hub repository brings its own, so it must be null there",
    )
    device: str = Field(default="auto", description="torch device; auto: CUDA if there is one")
    batch_size: int = Field(default=32, ge=1, description="images in one forward pass")


class Clip:
    """A loaded model with its preprocessing and tokenizer; ``logit_scale`` is exp of its log."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: torch.device) -> None:
        self._model, self._preprocess, self._tokenizer = model.eval(), preprocess, tokenizer
        self._device = device
        self.logit_scale = float(model.logit_scale.detach().exp())

    @torch.no_grad()
    def embed_images(self, images: Sequence[Any]) -> Tensor:
        """Unit vectors [N, D] float32 of PIL images."""
        pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in images])
        return normalize(self._model.encode_image(pixels.to(self._device)).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, D] float32."""
        tokens = self._tokenizer(list(texts))
        return normalize(self._model.encode_text(tokens.to(self._device)).float(), dim=-1).cpu()


def loader(config: ClipConfig) -> Callable[[], Clip]:
    """A function that returns the model, which it loads at the first call.

    ``UserError`` here if a path or device does not exist, there if open_clip does not know the
    model or cannot read its files.
    """
    name, pretrained = located(config.model_name, config.pretrained)
    device = _device(config.device)
    lock = Lock()

    def load() -> Clip:
        with lock:
            return loaded(name, pretrained, device)

    return load


def batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """The items in order, ``size`` at a time."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def located(model_name: str, pretrained: str | None) -> tuple[str, str | None]:
    """open_clip's arguments; ``UserError`` if a folder or file is missing or has no weights."""
    if model_name.startswith((HUB, LOCAL)) or _is_path(model_name):
        if pretrained is not None:
            raise UserError(
                f"pretrained: {pretrained!r} cannot go with model_name {model_name!r}, which "
                "brings its own weights; allowed: null"
            )
        return (model_name if model_name.startswith(HUB) else _folder(model_name)), None
    pretrained = pretrained or "openai"
    looks_like_file = pretrained.endswith(WEIGHT_SUFFIXES) or _is_path(pretrained)
    if looks_like_file and not Path(pretrained).is_file():
        raise UserError(f"pretrained: no such file {pretrained!r}")
    return model_name, pretrained


def _is_path(name: str) -> bool:
    return Path(name).is_dir() or ("/" in name and not NAME_WITH_SLASH.match(name))


def _folder(model_name: str) -> str:
    folder = Path(model_name.removeprefix(LOCAL))
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"model_name: no {CONFIG_FILE} in {str(folder)!r}")
    if not any(path.suffix in WEIGHT_SUFFIXES[:-1] for path in folder.iterdir()):
        raise UserError(f"model_name: no {', '.join(WEIGHT_SUFFIXES[:-1])} in {str(folder)!r}")
    return LOCAL + str(folder)


def _device(name: str) -> torch.device:
    if name == "auto":
        # With its index: reward threads start out with device 0 whatever the process uses.
        cuda = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device: {name!r} is no torch device ({error})") from error


def _open_clip() -> Any:
    # Imported late: it takes seconds that only its rewards should pay.
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"open_clip cannot be imported ({error}); torch and torchvision must come from the "
            "same release and both for CPU or both for the same CUDA"
        ) from error
    return open_clip


@cache
def loaded(name: str, pretrained: str | None, device: torch.device) -> Clip:
    """The model of ``located`` arguments; the same object for the same arguments."""
    open_clip = _open_clip()
    if not name.startswith((LOCAL, HUB)) and name.replace("/", "-") not in open_clip.list_models():
        raise UserError(f"model_name: unknown {name!r}; {nearest(name, open_clip.list_models())}")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            name, pretrained, device=device, weights_only=True, return_transform=True
        )
        return Clip(model, preprocess, open_clip.get_tokenizer(name), device)
    except LOAD_ERRORS as error:
        # The type, because the text of a KeyError is but the key.
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"open_clip cannot load {name!r} with {pretrained!r}: {reason}") from error
