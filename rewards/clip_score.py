"""Agreement of image and prompt: cosine of their CLIP embeddings (open_clip).

Range: ``cosine`` in [-1, 1], in practice 0.2 to 0.35; higher is better.  Published systems scale
the logit s cos instead, where s is the model's learned logit scale (100 for OpenAI's weights), and
their numbers do not compare: ``per30`` is s cos / 30 (Flow-GRPO), ``per100`` s cos / 100
(DiffusionNFT).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mmrl.errors import UserError
from mmrl.schema import StrictModel, nearest

PAPER = "Hessel et al. 2021, arXiv:2104.08718"

Scale = Literal["cosine", "per30", "per100"]
LOCAL, HUB = "local-dir:", "hf-hub:"
CONFIG_FILE = "open_clip_config.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


class Config(StrictModel):
    """Which CLIP model, and in which convention its score is reported."""

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
    scale: Scale = Field(
        default="cosine",
        description="cosine; per30: logit scale times cosine over 30; per100: the same over 100",
    )
    device: str = Field(default="auto", description="torch device; auto: CUDA if there is one")
    batch_size: int = Field(default=32, ge=1, description="images in one forward pass")


def build(config: Config) -> Callable[..., Tensor]:
    """``(prompts, images, **columns) -> [N]`` float32.

    The model is loaded at the first call.  ``UserError`` here if a path does not exist, there if
    open_clip does not know the model or its weights.
    """
    name, pretrained = located(config.model_name, config.pretrained)
    device = _device(config.device)
    lock = Lock()

    def reward(prompts: Sequence[str], outputs: Sequence[Any], **columns: Any) -> Tensor:
        with lock:
            clip = _loaded(name, pretrained, device)
        cosines = [
            clip.cosine(prompts[i : i + config.batch_size], outputs[i : i + config.batch_size])
            for i in range(0, len(prompts), config.batch_size)
        ]
        return torch.cat(cosines) * scale_factor(config.scale, clip.logit_scale)

    return reward


def scale_factor(scale: Scale, logit_scale: float) -> float:
    """What the cosine is multiplied by."""
    return {"cosine": 1.0, "per30": logit_scale / 30, "per100": logit_scale / 100}[scale]


def located(model_name: str, pretrained: str | None) -> tuple[str, str | None]:
    """open_clip's arguments; ``UserError`` if a folder or file is missing or has no weights."""
    if model_name.startswith(HUB) or model_name.startswith(LOCAL) or _is_path(model_name):
        if pretrained is not None:
            raise UserError(
                f"pretrained: {pretrained!r} cannot go with model_name {model_name!r}, which "
                "brings its own weights; allowed: null"
            )
        return (model_name if model_name.startswith(HUB) else _folder(model_name)), None
    pretrained = pretrained or "openai"
    if (_is_path(pretrained) or pretrained.endswith(WEIGHT_SUFFIXES)) and not Path(
        pretrained
    ).is_file():
        raise UserError(f"pretrained: no such file {pretrained!r}")
    return model_name, pretrained


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../")) or Path(name).is_dir()


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


class _Clip:
    """A loaded model with its preprocessing."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: torch.device) -> None:
        self._model, self._preprocess, self._tokenizer = model.eval(), preprocess, tokenizer
        self._device = device
        self.logit_scale = float(model.logit_scale.detach().exp())

    @torch.no_grad()
    def cosine(self, prompts: Sequence[str], images: Sequence[Any]) -> Tensor:
        """Cosines [N] float32 of the prompts and images at the same places."""
        pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in images])
        tokens = self._tokenizer(list(prompts))
        image = normalize(self._model.encode_image(pixels.to(self._device)).float(), dim=-1)
        text = normalize(self._model.encode_text(tokens.to(self._device)).float(), dim=-1)
        return (image * text).sum(-1).cpu()


def _open_clip() -> Any:
    # Imported late: it takes seconds that only this reward should pay.
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"open_clip cannot be imported ({error}); torch and torchvision must come from the "
            "same release and both for CPU or both for the same CUDA"
        ) from error
    return open_clip


@cache
def _loaded(name: str, pretrained: str | None, device: torch.device) -> _Clip:
    open_clip = _open_clip()
    if not name.startswith((LOCAL, HUB)) and name.replace("/", "-") not in open_clip.list_models():
        raise UserError(f"model_name: unknown {name!r}; {nearest(name, open_clip.list_models())}")
    try:
        model, preprocess = open_clip.create_model_from_pretrained(
            name, pretrained, device=device, weights_only=True, return_transform=True
        )
    except (RuntimeError, OSError, UnpicklingError) as error:
        raise UserError(f"open_clip cannot load {name!r} with {pretrained!r}: {error}") from error
    return _Clip(model, preprocess, open_clip.get_tokenizer(name), device)
