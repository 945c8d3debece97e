"""How exported weights of a vision-language model are used: a part of the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mmrl.text.card import sampling
from mmrl.types import DTYPES

LIBRARY, PIPELINE_TAG = "transformers", "image-text-to-text"
_ADAPTER = """\
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained({path}, dtype={dtype})
model = PeftModel.from_pretrained(base, ".")  # this folder
"""
_WHOLE_MODEL = """\
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", dtype={dtype})  # this folder
"""
_ASK = """\
processor = AutoProcessor.from_pretrained(".")
messages = {messages}
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open("image.png")], return_tensors="pt")
tokens = model.generate(
    **inputs,
{call})
answer = tokens[0, inputs["input_ids"].shape[1] :]
print(processor.tokenizer.decode(answer, skip_special_tokens=True))
"""


def usage(backend: Mapping[str, Any]) -> str:
    """Python code for the section ``backend`` of a run's configuration."""
    model, prompts = backend.get("model", {}), backend.get("prompts") or {}
    load = _WHOLE_MODEL if model.get("lora") is None else _ADAPTER
    content = [{"type": "image"}, {"type": "text", "text": "a prompt"}]
    messages: list[Any] = [{"role": "user", "content": content}]
    if prompts.get("system"):
        messages.insert(0, {"role": "system", "content": prompts["system"]})
    call = "".join(f"    {key}={value},\n" for key, value in sampling(backend).items())
    path, dtype = json.dumps(str(model.get("path"))), DTYPES[model.get("dtype", "bf16")]
    return load.format(path=path, dtype=dtype) + _ASK.format(messages=messages, call=call)
