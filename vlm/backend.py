"""Vision-language models on transformers: the text backend with images in its prompts.

A prompt's images are read once for all its completions, when these are sampled and again when they
are scored.  The vision tower is not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmrl.errors import UserError
from mmrl.resolve import resolve
from mmrl.text.backend import TextBackend, autocast, room_for_prompts
from mmrl.text.kernels import Heads, choose
from mmrl.text.loading import known, load_network
from mmrl.text.scoring import refuse_wrong_scores
from mmrl.types import DTYPES, Prompt
from vlm.config import Config
from vlm.encoding import Prompts
from vlm.estimate import describe, estimate_memory

PAPER = "Bai et al. 2025, arXiv:2502.13923"
__all__ = ["PAPER", "Config", "build", "describe", "estimate_memory"]
LOADER = "AutoModelForImageTextToText"


def build(
    config: Config,
    *,
    device: torch.device,
    prompts: Sequence[Prompt],
    seed: int,
    needs: frozenset[str],
) -> TextBackend:
    """Load processor and network.  Arguments and errors as those of the text backend.

    ``UserError`` also for an image that is missing, or cannot be read when its turn comes.
    """
    module = resolve("vision_models", config.model.family)
    processor = load_processor(config.model.path)
    network = load_network(
        config, seed, device, loader=LOADER, vision=True, targets=module.LORA_TARGETS
    )
    attention = choose(config, Heads.of(network), device)
    family = module.load(network)
    family.freeze_vision()
    limit = room_for_prompts(network, config)
    encoded = Prompts(prompts, config, processor, family, limit)
    with autocast(network, DTYPES[config.model.dtype]):
        refuse_wrong_scores(network, config, next(iter(encoded.values())), attention.name)
    return TextBackend(
        config,
        network,
        processor.tokenizer,
        encoded,
        keeps_reference="logp_ref" in needs,
        attention=attention,
        saved=processor,
        forbidden=family.forbidden(),
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
