"""The videos of a prompt, as frames: sampled and resized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Prompt
from vlm.config import VideoConfig
from vlm.images import described, open_image, pixel_limits, place, refuse_no_file


class Video(NamedTuple):
    """``frames`` [T, 3, H, W] of 0 to 255, and what transformers calls their ``metadata``: from it
    follow the seconds at which they stand.
    """

    frames: Tensor
    metadata: dict[str, Any]


def videos_of(prompt: Prompt, config: VideoConfig, patch_size: int) -> list[Video]:
    """In sizes that the model's patches divide, by qwen-vl-utils' rule.

    ``UserError`` that names the prompt's row and the video, for one that cannot be read.
    """
    from qwen_vl_utils import fetch_video
    from qwen_vl_utils.vision_process import VIDEO_MIN_TOKEN_NUM

    register_reader()
    limits = pixel_limits(config, VIDEO_MIN_TOKEN_NUM, patch_size)
    found = []
    for entry in videos_in(prompt, config):
        # RuntimeError: frames of several sizes, and failures of torchcodec and decord.
        try:
            asked = {**_sampled(entry, config), **limits}
            video: Any = fetch_video(asked, patch_size, return_video_metadata=True)
            found.append(Video(*video))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{place(prompt, config)} has a video that cannot be read, {described(entry)}: "
                f"{error}"
            ) from error
    return found


def refuse_missing(prompt: Prompt, config: VideoConfig) -> None:
    """``UserError`` for a video without frames, and a path where no file is; nothing is opened."""
    for entry in videos_in(prompt, config):
        if isinstance(entry, list) and not entry:
            raise UserError(f"{place(prompt, config)} has a video without frames")
        for path in entry if isinstance(entry, list) else [entry]:
            refuse_no_file(path, prompt, config)


def videos_in(prompt: Prompt, config: VideoConfig) -> list[Any]:
    """What stands in the column: paths, and lists of frames; a list of pictures is one video."""
    value = prompt.columns.get(config.column)
    if value is None or value == []:
        return []
    if not isinstance(value, list | tuple):
        return [value]
    if all(_is_picture(entry) for entry in value):
        return [list(value)]
    return [list(entry) if isinstance(entry, tuple) else entry for entry in value]


def _is_picture(entry: Any) -> bool:
    if isinstance(entry, str):
        # Pillow names the ending of MPEG, of which it reads no picture.
        kind = Image.registered_extensions().get(Path(entry).suffix.lower(), "MPEG")
        return entry.startswith("data:image") or kind != "MPEG"
    return isinstance(entry, Image.Image | Mapping)


def _sampled(entry: Any, config: VideoConfig) -> dict[str, Any]:
    """What qwen-vl-utils is asked for; it takes all frames of a list."""
    if isinstance(entry, list):
        count = min(len(entry), config.max_frames or len(entry))
        kept = torch.linspace(0, len(entry) - 1, count).round().long().tolist()
        rate = config.fps * count / len(entry)
        return {"video": [open_image(entry[i]) for i in kept], "sample_fps": rate}
    if not isinstance(entry, str) or "://" in entry:
        raise ValueError(f"{entry!r:.80} is neither a path nor a list of pictures")
    most = {} if config.max_frames is None else {"max_frames": config.max_frames}
    return {"video": entry, "fps": config.fps, **most}


def register_reader() -> None:
    """Let qwen-vl-utils read files with PyAV, which it brings along, where it has no better reader.

    That is the place of torchvision's, which is gone from torchvision 0.26 on.  The others are
    torchcodec, which needs FFmpeg on the system, and decord.
    """
    from qwen_vl_utils.vision_process import VIDEO_READER_BACKENDS

    readers: dict[str, Any] = VIDEO_READER_BACKENDS
    readers["torchvision"] = read_with_av


def read_with_av(asked: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any], float]:
    """Frames [T, 3, H, W] uint8 of ``asked["video"]``, their metadata, and how many a second.

    They are chosen as the other readers of qwen-vl-utils do.  ``ValueError`` for a file without a
    video, or with less of it than it says.
    """
    import av
    from qwen_vl_utils.vision_process import smart_nframes

    opened: Any = av.open(asked["video"])
    with opened as container:
        if not container.streams.video:
            raise ValueError(f"{asked['video']!r} has no video")
        stream = container.streams.video[0]
        # Some formats do not say how many there are; packets need no decoding.
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not rate:
            raise ValueError(f"{asked['video']!r} does not say how many frames a second it has")
        count = smart_nframes(dict(asked), total_frames=total, video_fps=rate)
        chosen = torch.linspace(0, total - 1, count).round().long().tolist()
        container.seek(0)
        frames = {
            i: frame.to_ndarray(format="rgb24")
            for i, frame in enumerate(container.decode(stream))
            if i in chosen
        }
    if len(frames) < len(chosen):
        raise ValueError(f"{asked['video']!r} ends before the {total} frames that it has")
    found = torch.stack([torch.from_numpy(frames[i]) for i in chosen]).permute(0, 3, 1, 2)
    metadata = {"fps": rate, "frames_indices": chosen, "total_num_frames": total}
    return found, metadata, count / total * rate
