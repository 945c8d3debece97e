"""The tokenizer and the network of a text run, and prompts as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmrl.adapters import add_lora
from mmrl.errors import UserError
from mmrl.noise import generator
from mmrl.text.attention import NAME, register
from mmrl.text.config import Config, ModelConfig, PromptConfig
from mmrl.text.layout import Encoded
from mmrl.types import DTYPES, Prompt
from mmrl.weights import trainable

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def load_tokenizer(path: str) -> Any:
    """``UserError`` if there is none."""
    from transformers import AutoTokenizer

    folder = known(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path = {path!r} has no tokenizer: {error}") from error


def load_network(
    config: Config,
    seed: int,
    device: torch.device,
    *,
    loader: str = "AutoModelForCausalLM",
    vision: bool = False,
    targets: Sequence[str] | str = LORA_TARGETS,
) -> Any:
    """The language model, ready to be trained; ``seed`` starts the adapter.

    ``loader``: a class of transformers.  ``vision``: it has a tower, which attends as usual.
    ``UserError`` if it cannot be loaded, or has no module that ``lora`` or ``targets`` name.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    register()
    model = config.model
    # Trained parameters must not pass through half precision on their way from the file.
    dtype = DTYPES[model.dtype] if model.lora else torch.float32
    kernel: Any = NAME if config.update != "padded" else "sdpa"
    kernel = {"text_config": kernel, "vision_config": "sdpa", "": "sdpa"} if vision else kernel
    folder = known(model.path)
    try:
        network: Any = getattr(transformers, loader).from_pretrained(
            folder, dtype=dtype, attn_implementation=kernel
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.path = {model.path!r} cannot be loaded: {error}") from error
    prepare(network, model, seed, targets)
    return network.to(device)


def prepare(
    network: Any, model: ModelConfig, seed: int, targets: Sequence[str] | str = LORA_TARGETS
) -> None:
    """Trained parameters in float32; with LoRA the others are frozen as they are."""
    network.eval()  # no dropout: a ratio compares the same function with itself
    if model.gradient_checkpointing:
        _recompute_blocks(network)
    if model.lora is None:
        network.float().requires_grad_(True)
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, 0, "lora").initial_seed())
        add_lora(network, model.lora, targets)
    for parameter in trainable(network).values():
        parameter.data = parameter.data.float()


def _recompute_blocks(network: Any) -> None:
    """Checkpoint every block.

    transformers does so where a block is in training mode.  What is inside stays without dropout.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    before_renaming = network.gradient_checkpointing_enable
    enable = getattr(network, "activation_checkpointing_enable", before_renaming)
    enable({"use_reentrant": False})
    for module in network.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


class Room(NamedTuple):
    """``tokens`` that a prompt may have, and ``why`` no more: what the limit follows from."""

    tokens: int
    why: str

    def refuse(self, prompt: Prompt, count: int) -> None:
        """``UserError`` for a prompt of ``count`` tokens that are none or too many."""
        if not 1 <= count <= self.tokens:
            raise UserError(
                f"{prompt.named} has {count} tokens; allowed: 1 to {self.tokens} ({self.why})"
            )


def encode(
    tokenizer: Any, prompts: Sequence[Prompt], config: PromptConfig, room: Room
) -> dict[str, Encoded]:
    """By prompt id; ``UserError`` for a prompt for which there is no ``room``.

    The messages of a prompt that has some go into the chat template; the configured system message
    comes before them unless they begin with one.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    chat = has_template if config.chat is None else config.chat
    if (chat or config.system) and not has_template:
        system = f"backend.prompts.system = {config.system!r:.40}"
        key = "backend.prompts.chat = true" if config.chat else system
        raise UserError(f"{key}: this tokenizer has no chat template; allowed: false or null")
    found = {}
    for prompt in prompts:
        if len(prompt.messages) > 1 and not chat:
            raise UserError(
                f"{prompt.named} has {len(prompt.messages)} messages, which need a chat template; "
                "this tokenizer has none, or backend.prompts.chat = false"
            )
        ids = _chat(tokenizer, prompt, config) if chat else tokenizer(prompt.text).input_ids
        room.refuse(prompt, len(ids))
        found[prompt.id] = Encoded.of_text(list(ids))
    return found


def _chat(tokenizer: Any, prompt: Prompt, config: PromptConfig) -> list[int]:
    given = prompt.messages or [{"role": "user", "content": prompt.text}]
    messages = [{**message, "content": _written(message, prompt)} for message in given]
    if config.system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": config.system})
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def _written(message: Mapping[str, Any], prompt: Prompt) -> str:
    """The content as one text, as templates of text models want it."""
    parts = message["content"]
    parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
    for part in parts:
        if not isinstance(part.get("text"), str):
            raise UserError(
                f"{prompt.named} has a part of type {part.get('type')!r} in its messages; a text "
                "model reads text only"
            )
    return "\n".join(part["text"] for part in parts)


def end_tokens(tokenizer: Any, network: Any) -> frozenset[int]:
    """Ids that end a completion: what the model's files say, and the tokenizer."""
    named = getattr(network.generation_config, "eos_token_id", None)
    named = [named] if isinstance(named, int) else list(named or ())
    return frozenset(i for i in [*named, tokenizer.eos_token_id] if i is not None)


def known(path: str) -> str:
    """``UserError`` for a folder that is not there, which the hub would otherwise be asked for."""
    if not Path(path).is_dir() and (path.startswith((".", "/")) or Path(path).parent.is_dir()):
        raise UserError(f"model.path = {path!r} does not exist (from {Path.cwd()})")
    return path
