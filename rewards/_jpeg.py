"""Size of an image as JPEG, shared by the two compressibility rewards."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

QUALITY = 95


def size_kb(image: Image.Image) -> float:
    """Bytes of the quality-95 JPEG of ``image`` over 1000; ``TypeError`` if it is no PIL image."""
    if not isinstance(image, Image.Image):
        raise TypeError(f"a JPEG size needs PIL images, not {type(image).__name__}")
    with BytesIO() as buffer:
        image.convert("RGB").save(buffer, format="JPEG", quality=QUALITY)
        return buffer.tell() / 1000
