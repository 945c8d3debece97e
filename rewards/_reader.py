"""Reading the text of images with rapidocr: offline, batched, cached, safe between threads."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

# Recognition shrinks every line to 48 pixels; glyphs below that height are read better when they
# are enlarged smoothly first (whole factors keep strokes even).
MIN_HEIGHT = 64
LINE_HEIGHT = 48
BATCH = 8
CACHE_SIZE = 65_536


class Reader:
    """Text of images; one recognition for each distinct image, however often it is asked for.

    ``detect``: find text regions first (150-500 ms an image) instead of taking the whole image as
    one line (about 4 ms).  ``num_threads``: onnxruntime's threads within an operator.
    """

    def __init__(self, *, detect: bool, num_threads: int, cache_size: int = CACHE_SIZE) -> None:
        self._detect = detect
        self._num_threads = num_threads
        self._cache_size = cache_size
        self._engine: Any = None
        self._texts: OrderedDict[bytes, str] = OrderedDict()
        self._lock = Lock()

    def read(self, images: Sequence[Image.Image]) -> list[str]:
        """The text of each image, "" where none is seen; ``TypeError`` if one is no PIL image."""
        rgb = [_rgb(image) for image in images]
        keys = [_key(image) for image in rgb]
        # One lock for look-up and recognition: a second reward that asks for the same images at
        # the same time waits for the texts instead of computing them again.
        with self._lock:
            missing = {key: image for key, image in zip(keys, rgb, strict=True)}
            missing = {key: image for key, image in missing.items() if key not in self._texts}
            fresh = dict(zip(missing, self._recognise(list(missing.values())), strict=True))
            found = [fresh[key] if key in fresh else self._recall(key) for key in keys]
            self._remember(fresh)
        return found

    def _recall(self, key: bytes) -> str:
        self._texts.move_to_end(key)
        return self._texts[key]

    def _remember(self, texts: dict[bytes, str]) -> None:
        self._texts.update(texts)
        while len(self._texts) > self._cache_size:
            self._texts.popitem(last=False)

    def _recognise(self, images: list[Image.Image]) -> list[str]:
        if not images:
            return []
        self._engine = self._engine or _engine(self._num_threads)
        arrays = [_bgr(_enlarged(image)) for image in images]
        read = self._read_regions if self._detect else self._read_lines
        return read(arrays)

    def _read_regions(self, arrays: list[np.ndarray]) -> list[str]:
        results = (self._engine(array, use_det=True, use_cls=False) for array in arrays)
        return [" ".join(result.txts or ()) for result in results]

    def _read_lines(self, arrays: list[np.ndarray]) -> list[str]:
        """Each image as one line.

        Lines of a batch are padded to its widest one, and padding may change a reading: images of
        one shape go together, so that what is read never depends on the company.
        """
        texts = [""] * len(arrays)
        for shape in sorted({array.shape for array in arrays}):
            where = [i for i, array in enumerate(arrays) if array.shape == shape]
            lines = self._engine.recognize_txt([arrays[i] for i in where]).txts
            for i, text in zip(where, lines, strict=True):
                texts[i] = text
        return texts


@cache
def shared_reader(detect: bool, num_threads: int) -> Reader:
    """The process's reader with these settings, so that rewards share engine and cache."""
    return Reader(detect=detect, num_threads=num_threads)


def _engine(num_threads: int) -> Any:
    # Imported here because it takes half a second that `mmrl check` need not pay.
    from rapidocr import RapidOCR

    return RapidOCR(
        params={
            "Global.log_level": "error",
            "Global.text_score": 0.0,
            "EngineConfig.onnxruntime.intra_op_num_threads": num_threads,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Rec.rec_batch_num": BATCH,
            # The least width lines are padded to; the usual 320 triples the time for short texts.
            "Rec.rec_img_shape": [3, LINE_HEIGHT, LINE_HEIGHT],
        }
    )


def _rgb(image: Any) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise TypeError(f"text is read from PIL images, not {type(image).__name__}")
    return image.convert("RGB")


def _key(image: Image.Image) -> bytes:
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.digest()


def _enlarged(image: Image.Image) -> Image.Image:
    factor = -(-MIN_HEIGHT // image.height)
    if factor == 1:
        return image
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.BICUBIC)


def _bgr(image: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])
