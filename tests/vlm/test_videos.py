"""Videos in prompts, beside images and text alone: what transformers says of the same prompts."""

from __future__ import annotations

import pytest
import torch
from PIL import ImageColor
from pydantic import ValidationError
from test_vlm import LOGP, WAYS, kinds, move
from tiny_text import make_batch, make_requests
from tiny_vlm import make_backend, picture, save_video
from transformers import AutoModelForImageTextToText

from mmrl.errors import UserError
from mmrl.text.layout import Encoded, lay_out
from mmrl.types import Prompt
from mmrl.weights import trainable
from vlm.config import VideoConfig
from vlm.encoding import conversation
from vlm.videos import Video, read_with_av, videos_in, videos_of

FPS = 0.25
"""Of frames in lists; so few that positions in time go beyond those of the text behind a video."""
FILE = 2 * 1.5 / 4
"""Seconds between places in time of the file: of its 1.5 seconds four frames are read, and two
together have one place."""
SECONDS = {"file": [FILE], "mixed": [2 / FPS], "both": [2 / FPS, FILE]}
PIXELS = {"min_pixels": 784, "max_pixels": 7000}


def backend_of(folders, family, prompts, *args, **changes):
    changes = {"videos": {**PIXELS, "fps": FPS}} | changes
    return make_backend(folders[family], family, prompts, *args, **changes)


def as_transformers_takes_it(prompt: Prompt, encoded: Encoded, family: str, after=()) -> dict:
    ids = torch.tensor([[*encoded.ids, *after]])
    types = (ids == 5).int() + 2 * (ids == 6).int()
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **encoded.inputs}
    if encoded.inputs:
        inputs["mm_token_type_ids"] = types
    if family == "qwen2_5_vl" and prompt.id in SECONDS:
        inputs["second_per_grid_ts"] = torch.tensor(SECONDS[prompt.id])
    return inputs


@WAYS
def test_scores_are_those_of_transformers(folders, films, family, update):
    backend = backend_of(folders, family, films, update=update)
    groups = list(backend.rollout(make_requests(prompts=films, group_size=2)))
    batch = make_batch(backend, groups)
    found = backend.evaluate(batch, LOGP).logp.detach()
    model = AutoModelForImageTextToText.from_pretrained(folders[family])
    for i, row in enumerate(batch.payload):
        inputs = as_transformers_takes_it(films[i // 2], row.prompt, family, row.completion)
        with torch.no_grad():
            logits = model(**inputs).logits
        logp = logits[0, len(row.prompt.ids) - 1 : -1].log_softmax(-1)
        expected = logp[range(len(row.completion)), list(row.completion)]
        torch.testing.assert_close(found[i, : len(expected)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("update", ["shared_prompt", "packed"])
def test_gradients_are_those_of_the_padded_form(folders, films, family, update):
    gradients = []
    for way in (update, "padded"):
        backend = backend_of(folders, family, films, update=way)
        groups = list(backend.rollout(make_requests(prompts=films, group_size=3)))
        move(backend)
        backend.evaluate(make_batch(backend, groups), LOGP).logp.sum().backward()
        live = trainable(backend.model).values()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in live]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_greedy_completions_are_those_of_transformers(folders, films, family):
    greedy = {"temperature": 0.0, "max_tokens": 6}
    backend = backend_of(folders, family, films, evaluation=greedy)
    backend._forbidden = ()  # transformers may choose anything
    model = AutoModelForImageTextToText.from_pretrained(folders[family])
    for group in backend.rollout(make_requests(prompts=films, group_size=1), evaluation=True):
        encoded = group.payload.prompt
        inputs = as_transformers_takes_it(group.request.prompt, encoded, family)
        expected = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert group.payload.samples[0].ids == expected[0, len(encoded.ids) :].tolist()


def test_time_goes_beyond_the_text_behind_a_video(folders, films):
    """Else the tests above would not tell where a completion goes on."""
    mixed = backend_of(folders, "qwen2_5_vl", films)._prompts["mixed"]
    assert int(mixed.positions.max()) > mixed.after


def test_times_are_written_out_for_qwen3(folders, films):
    backend = backend_of(folders, "qwen3_vl", films)
    encoded = backend._prompts["mixed"]
    # Six frames, two together: three places, each behind its time and in a frame of its own.
    assert list(encoded.ids).count(3) == 1 + 1 + 3
    assert list(encoded.ids).count(6) == 3 * 2 * int(encoded.inputs["video_grid_thw"][0, 1]) // 2


def test_videos_of_a_prompt_are_read_once_for_all_completions(folders, films, family):
    backend = backend_of(folders, family, films)
    groups = list(backend.rollout(make_requests(prompts=films)))
    rows = make_batch(backend, groups).payload
    shared, apart = (lay_out(rows, share_prompts=share).inputs for share in (True, False))
    assert len(shared["video_grid_thw"]) == 4
    assert len(apart["video_grid_thw"]) == 16
    assert len(shared["image_grid_thw"]) == 2


def test_tokens_without_a_feature_are_refused(folders, films, family):
    backend = backend_of(folders, family, films)
    group = next(iter(backend.rollout(make_requests(prompts=films[1:2], group_size=2))))
    backend.collate([(group, 0), (group, 1)])
    group.payload.samples[1].ids[0] = 6  # a place for a video
    with pytest.raises(
        UserError, match=r"'is <image> not in <video> \?' has 13 video tokens for 12"
    ):
        backend.collate([(group, 0), (group, 1)])


@pytest.mark.parametrize("token", ["image", "video"])
def test_tokens_of_vision_in_a_text_are_refused(folders, films, family, token):
    prompt = Prompt(id="x", text=f"go <|{token}_pad|> up")
    with pytest.raises(UserError, match=rf"'go <|{token}_pad|> up' has .* 1 times .* for 0"):
        backend_of(folders, family, [prompt])


# From a column to frames


def config_of(**changes) -> VideoConfig:
    return VideoConfig(**PIXELS | changes)


def video_of(value, **changes) -> Video:
    prompt = Prompt(id="v", text="go up", columns={"videos": value})
    return videos_of(prompt, config_of(**changes), 14)[0]


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_frames_of_a_file(tmp_path, ending):
    """A webm does not say how many it has."""
    path = save_video(tmp_path / f"film.{ending}")
    frames, metadata, rate = read_with_av({"video": path, "fps": 4.0})
    assert frames.shape == (6, 3, 56, 64)
    assert metadata == {"fps": 8.0, "frames_indices": [0, 2, 4, 7, 9, 11], "total_num_frames": 12}
    assert rate == 4.0
    colours = ["red", "red", "green", "green", "blue", "blue"]
    for frame, colour in zip(frames, colours, strict=True):
        expected = torch.tensor(ImageColor.getrgb(colour)).float()
        torch.testing.assert_close(frame[:, 28, 26].float(), expected, atol=40, rtol=0)


def test_how_many_frames(tmp_path):
    path = save_video(tmp_path / "film.mp4")
    assert len(video_of(path).frames) == 4, "two a second would be three, at least four are read"
    assert len(video_of(path, fps=8.0).frames) == 12
    assert len(video_of(path, fps=8.0, max_frames=6).frames) == 6
    pictures = [picture("red")] * 7
    assert len(video_of(pictures).frames) == 8, "the last one twice, for two are read together"
    thinned = video_of(pictures, max_frames=4, fps=1.0)
    assert len(thinned.frames) == 4
    assert thinned.metadata["fps"] == pytest.approx(4 / 7), "they stand for the same seven seconds"


def test_sizes_of_frames(tmp_path):
    path = save_video(tmp_path / "film.mp4")
    assert video_of(path).frames.shape[2:] == (56, 56)
    assert video_of(path, max_pixels=1600).frames.shape[2:] == (28, 28)
    small = videos_of(Prompt(id="v", text="", columns={"videos": path}),
                      VideoConfig(max_pixels=1600), 14)  # fmt: skip
    assert small[0].frames.shape[2:] == (28, 28), "the default of min_pixels is more than that"
    with pytest.raises(ValidationError, match=r"videos.min_pixels = 9 is more than max_pixels = 4"):
        VideoConfig(min_pixels=9, max_pixels=4)
    with pytest.raises(ValidationError, match="multiple of 2"):
        config_of(max_frames=3)


def test_what_is_one_video_and_what_are_several():
    def entries(value):
        return videos_in(Prompt(id="v", text="", columns={"videos": value}), VideoConfig())

    red, stored = picture("red"), {"bytes": b"", "path": "a.png"}
    assert entries(None) == entries([]) == []
    assert entries("a.mp4") == ["a.mp4"]
    assert entries(["a.mp4", "b.mpg"]) == ["a.mp4", "b.mpg"]
    assert entries(["a.png", "b.JPG"]) == [["a.png", "b.JPG"]]
    assert entries((red, stored)) == [[red, stored]]
    assert entries([["a.png"], "b.webm", (red,)]) == [["a.png"], "b.webm", [red]]


def test_videos_stand_where_the_text_has_marks_or_before_it():
    marked = Prompt(id="", text="a <video> b <image>")
    assert kinds(marked, 1, 1) == [["text", "video", "text", "image"]]
    assert kinds(Prompt(id="", text="a"), 1, 2) == [["image", "video", "video", "text"]]
    assert kinds(Prompt(id="", text="a <image>"), 1, 1) == [["video", "text", "image"]]
    parts = [{"type": "video"}, {"type": "text", "text": "b"}]
    messages = ({"role": "user", "content": parts},)
    assert kinds(Prompt(id="", text="b", messages=messages), 0, 1) == [["video", "text"]]
    with pytest.raises(UserError, match="has places for 1 videos and 2 videos"):
        conversation(Prompt(id="", text="<video> a"), 0, 2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("nowhere.mp4", "names 'nowhere.mp4', which is no file"),
        (["nowhere.png", "there.png"], "names 'nowhere.png', which is no file"),
        ([[]], "has a video without frames"),
        (
            [picture("red", 56, 56), picture("red", 112, 56)],
            "read, list of 2: .* equal size",
        ),
        ([{"url": "x"}], "cannot be read, list of 1: .* neither a picture nor a path"),
        ("https://host/film.mp4", "names 'https://host/film.mp4', which is no file"),
        (7, "cannot be read, int: 7 is neither a path nor a list of pictures"),
    ],
)
def test_what_is_no_video(folders, family, value, message):
    prompt = Prompt(id="x", text="go up", columns={"videos": value})
    place = "prompt 'go up': backend.videos.column = 'videos'"
    with pytest.raises(UserError, match=f"{place} .*{message}"):
        backend_of(folders, family, [prompt], videos={"min_pixels": 784, "max_pixels": 20000})


@pytest.mark.parametrize(("name", "ending"), [("a.mp4", "mp4"), ("a.png", "png")])
def test_a_file_that_cannot_be_read(tmp_path, name, ending):
    path = tmp_path / name
    path.write_text("no video")
    with pytest.raises(UserError, match=r"prompt 'go up': .* has a video that cannot be read, "):
        video_of(str(path) if ending == "mp4" else [str(path)])


def test_a_file_that_was_cut(tmp_path):
    path = tmp_path / "film.avi"
    save_video(path, each=40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"cannot be read, '.*film.avi': .* ends before the 120 frames that it has"
    ):
        video_of(str(path))
