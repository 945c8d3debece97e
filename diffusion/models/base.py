"""What every model family shares: encoded prompts, and where a pipeline lies on disk."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Encoded prompts: ``text`` [B, S, D] token embeddings, ``pooled`` [B, P]."""

    text: Tensor
    pooled: Tensor

    @staticmethod
    def stack(rows: Sequence[Condition], device: torch.device) -> Condition:
        """One batch of several, on ``device``."""
        text = torch.cat([row.text for row in rows]).to(device)
        return Condition(text=text, pooled=torch.cat([row.pooled for row in rows]).to(device))

    def repeat(self, times: int) -> Condition:
        """The whole batch ``times`` times over, one after another."""
        return Condition(text=self.text.repeat(times, 1, 1), pooled=self.pooled.repeat(times, 1))


def locate(path: str, *, weights: bool) -> Path:
    """The local folder of a pipeline; a hub id is fetched into the hub's cache.

    ``weights``: also fetch safetensors, not only configurations and tokenizers.  ``UserError`` if
    there is no such folder, it is no pipeline, or the hub cannot serve it.
    """
    folder = Path(path)
    if not folder.is_dir():
        if not _is_hub_id(path):
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
    return 2 ** (len(read_json(folder, "vae", "config.json")["block_out_channels"]) - 1)


def _is_hub_id(path: str) -> bool:
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
