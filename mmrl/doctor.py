"""What works on this machine: versions, devices, number formats, attention kernels, OCR."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "fail"]
PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "rapidocr",
    "onnxruntime",
    "open-clip-torch",
    "pydantic",
)
OPTIONAL_PACKAGES = ("xformers", "flash-attn", "deepspeed")
# Versions that do not fit each other show only when the compiled parts are loaded.
IMPORTS = {
    "diffusers": "StableDiffusion3Pipeline",
    "transformers": "CLIPTextModelWithProjection",
    "peft": "LoraConfig",
    "open_clip": "create_model",
}


@dataclass(frozen=True)
class Check:
    """One line of ``mmrl doctor``.

    ``status``: ``ok``; ``note`` for something optional that is missing; ``fail`` for something
    that a run needs.
    """

    topic: str
    status: Status
    detail: str


def examine() -> Iterator[Check]:
    """Every check, each yielded when done: some load a library and take seconds."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        yield package(name, missing="fail")
    for name in OPTIONAL_PACKAGES:
        yield package(name, missing="note")
    for module, attribute in IMPORTS.items():
        yield importable(module, attribute)
    for device in devices():
        yield Check(f"device {device}", "ok", describe_device(device))
        yield Check(f"dtypes on {device}", "ok", ", ".join(working_dtypes(device)))
        yield from attention(device)
    yield offline_ocr()
    yield writable(Path.cwd())


def package(name: str, *, missing: Status) -> Check:
    """The installed version of a distribution, or ``missing``."""
    try:
        return Check(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Check(name, missing, "not installed")


def importable(module: str, attribute: str) -> Check:
    """Whether a library really loads, down to one object that a run uses."""
    topic = f"import {module}"
    try:
        getattr(importlib.import_module(module), attribute)
    except Exception as error:
        # A mismatch of compiled libraries may raise anything; the first cause is the telling one.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        return Check(topic, "fail", f"{attribute}: {type(cause).__name__}: {cause}")
    return Check(topic, "ok", f"{attribute} loads")


def devices() -> list[str]:
    """Devices that torch can use: the CPU and every accelerator."""
    import torch

    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", *found, *(["mps"] if torch.backends.mps.is_available() else [])]


def describe_device(device: str) -> str:
    """Name and size of a device."""
    import torch

    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if device == "cpu":
        return f"{len(os.sched_getaffinity(0)) if _has_affinity() else os.cpu_count()} cores"
    return platform.processor()


def working_dtypes(device: str) -> list[str]:
    """Formats in which a small matrix product runs on the device."""
    import torch

    working = []
    for name, dtype in {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }.items():
        try:
            ones = torch.ones(8, 8, device=device, dtype=dtype)
            works = bool((ones @ ones == 8).all())
        except RuntimeError:
            works = False
        working += [name] if works else []
    return working


def attention(device: str) -> Iterator[Check]:
    """Whether each attention kernel works on the device; a missing one is only a note."""
    import torch

    from diffusion import attention as images
    from mmrl.text import kernels as text

    for kind, home in {"image": images, "text": text}.items():
        for name, works, reason in home.available_backends(torch.device(device)):
            topic = f"{kind} attention {name} on {device}"
            yield Check(topic, "ok" if works else "note", reason or "works")


def offline_ocr() -> Check:
    """Read a rendered text with the OCR reward, whose models come with its package."""
    from PIL import Image, ImageDraw, ImageFont

    from rewards.ocr import Config, build

    image = Image.new("RGB", (128, 64), "white")
    font = ImageFont.load_default(40)
    ImageDraw.Draw(image).text((64, 32), "42", fill="black", font=font, anchor="mm")
    try:
        score = float(build(Config())(["a sign"], [image], text=["42"])[0])
    except Exception as error:
        # Whatever breaks inside a third-party reader is the finding, not a crash of the doctor.
        return Check("ocr reward", "fail", f"{type(error).__name__}: {error}")
    if score < 1:
        return Check("ocr reward", "fail", f"a plain rendered 42 scores {score:.2f} instead of 1")
    return Check("ocr reward", "ok", "reads a rendered text")


def writable(folder: Path) -> Check:
    """Whether run folders can be made in ``folder``."""
    try:
        with tempfile.TemporaryDirectory(dir=folder):
            return Check("current folder", "ok", f"{folder} is writable")
    except OSError as error:
        return Check("current folder", "fail", f"{folder}: {error.strerror}")


def _has_affinity() -> bool:
    return hasattr(os, "sched_getaffinity")
