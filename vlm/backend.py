"""Vision-language models on transformers: the text backend with images and videos in its prompts.

A prompt's pictures are read once for all its completions, when these are sampled and again when
they are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.resolve import resolve
from mmrl.text.backend import TextBackend, autocast, room_for_prompts
from mmrl.text.demonstrations import encode_demonstrations
from mmrl.text.kernels import Heads, choose
from mmrl.text.loading import known, load_network
from mmrl.text.scoring import refuse_wrong_scores
from mmrl.types import DTYPES, Prompt, RolloutGroup
from mmrl.weights import trainable
from vlm.config import Config
from vlm.encoding import Prompts
from vlm.estimate import describe, estimate_memory

PAPER = "Bai et al. 2025, arXiv:2502.13923"
__all__ = ["PAPER", "Config", "VisionBackend", "build", "describe", "estimate_memory"]
LOADER = "AutoModelForImageTextToText"


class VisionBackend(TextBackend):
    """Whose batches are checked to have a place for every feature of their pictures."""

    def __init__(self, *args: Any, family: Any, **options: Any) -> None:
        """``family``: see ``vlm.models.base``.  The others as those of the text backend."""
        super().__init__(*args, **options, forbidden=family.forbidden())
        self._family = family

    def collate(
        self, rows: Sequence[tuple[RolloutGroup, int]], decisions: slice = slice(None)
    ) -> tuple[Any, Tensor]:
        """As the text backend.  ``UserError`` where tokens and features do not match."""
        payload, mask = super().collate(rows, decisions)
        for (group, _), row in zip(rows, payload, strict=True):
            ids = [*row.prompt.ids, *row.completion]
            self._family.refuse_mismatch(ids, row.prompt.inputs, group.request.prompt)
        return payload, mask


def build(
    config: Config,
    *,
    device: torch.device,
    prompts: Sequence[Prompt],
    seed: int,
    needs: frozenset[str],
) -> VisionBackend:
    """Load processor and network.  Arguments and errors as those of the text backend.

    ``UserError`` also for an image or a video that is missing, or cannot be read when its turn
    comes, and for ``model.train_vision`` where that trains nothing.
    """
    kind = resolve("vision_models", config.model.family).load
    processor = load_processor(config.model.path)
    targets = kind.lora_targets(train_vision=config.model.train_vision)
    network = load_network(config, seed, device, loader=LOADER, vision=True, targets=targets)
    attention = choose(config, Heads.of(network), device)
    if not config.model.train_vision:
        kind.freeze_vision(network)
    family = kind(network)
    encoded = Prompts(prompts, config, processor, family, room_for_prompts(network, config))
    _refuse_nothing_trained(config, kind.tower_of(network), encoded)
    family.keep_in_step(encoded.kinds)
    with autocast(network, DTYPES[config.model.dtype]):
        refuse_wrong_scores(network, config, next(iter(encoded.values())), attention.name)
    return VisionBackend(
        config,
        network,
        processor.tokenizer,
        encoded,
        keeps_reference="logp_ref" in needs,
        attention=attention,
        saved=processor,
        demonstrations=encode_demonstrations(
            processor.tokenizer, prompts, config.rollout, family.forbidden()
        ),
        family=family,
    )


def _refuse_nothing_trained(config: Config, tower: Any, encoded: Prompts) -> None:
    if not config.model.train_vision:
        return
    if not trainable(tower):
        lora = config.model.lora
        raise UserError(
            "model.train_vision = true, but model.lora.target_modules = "
            f"{lora and lora.target_modules} names nothing in the vision tower; allowed: null"
        )
    if not encoded.kinds:
        columns = *config.images.columns, config.videos.column
        raise UserError(
            f"model.train_vision = true, but no prompt has one of the columns {columns}"
        )


def load_processor(path: str) -> Any:
    """``UserError`` if there is none, or it has no chat template."""
    from transformers import AutoProcessor

    folder = known(path)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path = {path!r} has no processor: {error}") from error
    if getattr(processor, "image_processor", None) is None:
        raise UserError(f"model.path = {path!r} has a processor that takes no images")
    if getattr(processor, "chat_template", None) is None:
        raise UserError(f"model.path = {path!r}: its processor has no chat template")
    return processor
