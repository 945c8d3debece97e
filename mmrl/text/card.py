"""How exported weights of a language model are used: a part of the model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrl.types import DTYPES

LIBRARY, PIPELINE_TAG = "transformers", "text-generation"
_ADAPTER = """\
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained(".", dtype={dtype})  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
"""
_WHOLE_MODEL = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", dtype={dtype})  # this folder
tokenizer = AutoTokenizer.from_pretrained(".")
"""
_CHAT = """\
inputs = tokenizer.apply_chat_template(
    {messages},
    add_generation_prompt=True,
    return_dict=True,
    return_tensors="pt",
)
"""
_PLAIN = """\
inputs = tokenizer("a prompt", return_tensors="pt")
"""
_ASK = """\
tokens = model.generate(
    **inputs,
{call})
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def usage(backend: Mapping[str, Any]) -> str:
    """Python code for the section ``backend`` of a run's configuration."""
    model, prompts = backend.get("model", {}), backend.get("prompts") or {}
    load = _WHOLE_MODEL if model.get("lora") is None else _ADAPTER
    system = prompts.get("system")
    messages = [{"role": "user", "content": "a prompt"}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    ask = _PLAIN if prompts.get("chat") is False else _CHAT.format(messages=messages)
    call = "".join(f"    {key}={value},\n" for key, value in sampling(backend).items())
    return load.format(dtype=DTYPES[model.get("dtype", "bf16")]) + ask + _ASK.format(call=call)


def sampling(backend: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` for samples like those of the run's evaluation."""
    changes = {k: v for k, v in (backend.get("evaluation") or {}).items() if v is not None}
    rollout = {**(backend.get("rollout") or {}), **changes}
    temperature = rollout.get("temperature", 1.0)
    found: dict[str, Any] = {"max_new_tokens": rollout.get("max_tokens", 256)}
    if temperature == 0:
        return found | {"do_sample": False}
    found |= {"do_sample": True, "temperature": temperature, "top_p": rollout.get("top_p", 1.0)}
    # transformers keeps the 50 likeliest tokens unless told otherwise.
    return found | {"top_k": rollout.get("top_k") or 0}
