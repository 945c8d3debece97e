"""OCR reward: reading rendered signs, and the scores against a distance written here."""

from __future__ import annotations

import logging
import math
import threading

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from rewards import ocr
from rewards._reader import Reader, _bgr, shared_reader

NUMBERS = [str(n) for n in range(10, 100, 7)]
WORDS = ["CAT", "BUS", "KEY", "EGG", "Hello"]


def edit_distance(a: str, b: str) -> int:
    """Wagner-Fischer: the least number of insertions, deletions and substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y)))
    return row[-1]


@pytest.fixture(scope="module")
def soft():
    return ocr.build(ocr.Config())


@pytest.fixture(scope="module")
def exact():
    return ocr.build(ocr.Config(mode="exact"))


@pytest.mark.parametrize("mode", ["soft", "exact"])
def test_right_text_scores_one(mode, sign):
    texts = NUMBERS + WORDS
    reward = ocr.build(ocr.Config(mode=mode))
    scores = reward([f'a red sign "{text}"' for text in texts], [sign(text) for text in texts])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0] * len(texts)


@pytest.mark.parametrize(
    ("target", "shown"),
    [("47", "41"), ("CAT", "BUS"), ("EGG", "EG"), ("Hello", "Help"), ("5", "89")],
)
def test_wrong_text_scores_by_edit_distance(target, shown, soft, exact, sign):
    prompt = [f'"{target}"']
    distance = min(edit_distance(target.lower(), shown.lower()), len(target))
    assert soft(prompt, [sign(shown)]).item() == pytest.approx(1 - distance / len(target))
    assert exact(prompt, [sign(shown)]).item() == 0.0


def test_longer_text_contains_the_target_but_is_not_exact(soft, exact, sign):
    assert soft(['"EGG"'], [sign("EGGS")]).item() == 1.0
    assert exact(['"EGG"'], [sign("EGGS")]).item() == 0.0


@pytest.mark.parametrize("target", ["kitten", "ab", "a", "saturday"])
@pytest.mark.parametrize("read", ["", "sitting", "ba", "sunday", "xxxxxxxxxxxxxxxxx", "kittten"])
def test_soft_score_formula(target, read):
    distance = edit_distance(target, read)
    expected = 1.0 if target in read else 1 - min(distance, len(target)) / len(target)
    assert ocr.soft_score(target, read) == pytest.approx(expected, abs=1e-12)


def test_target_column_precedes_quotes_and_missing_target_is_nan(soft, sign):
    images = [sign("47")] * 4
    prompts = ['a "12"', 'a "47"', "nothing to read", 'empty ""']
    scores = soft(prompts, images, text=["47", None, None, None])
    assert scores[:2].tolist() == [1.0, 1.0]
    assert all(math.isnan(score) for score in scores[2:].tolist())
    assert soft(['a "47" then "12"'], [sign("47")], other=["column"]).item() == 1.0


def test_case_and_white_space_do_not_count():
    assert ocr.target_of('say "Hello  World"') == "helloworld" == ocr.normalised(" hel LO\nworld ")


def test_columns_may_be_numbers(soft, sign):
    assert soft(["x"], [sign("47")], text=[47]).item() == 1.0


def test_reading_does_not_depend_on_the_batch(sign):
    images = [sign(t, size) for t in ("47", "CAT") for size in ((64, 32), (32, 32), (200, 40))]
    together = Reader(detect=False, num_threads=1).read(images)
    alone = [Reader(detect=False, num_threads=1).read([image])[0] for image in images]
    assert together == alone
    assert together[0] == "47"
    assert together[5] == "CAT"


def test_detection_finds_text_in_a_large_image(sign):
    canvas = Image.new("RGB", (256, 192), "white")
    canvas.paste(sign("HELLO", (110, 40)), (20, 20))
    canvas.paste(sign("WORLD", (110, 40)), (120, 120))
    reward = ocr.build(ocr.Config(detect=True))
    prompts = ['"hello"', '"world"', '"hello world"']
    assert reward(prompts, [canvas] * 3).tolist() == [1.0] * 3
    blank = Image.new("RGB", (256, 192), "white")
    assert reward(['"hello"'], [blank]).tolist() == [0.0]


class CountingReader(Reader):
    """Counts the images that are really recognised."""

    num_recognised = 0

    def _recognise(self, images):
        self.num_recognised += len(images)
        return super()._recognise(images)


def test_each_image_is_recognised_once(sign):
    reader = CountingReader(detect=False, num_threads=1)
    images = [sign("11"), sign("22"), sign("11")]
    assert reader.read(images) == reader.read(images) == ["11", "22", "11"]
    assert reader.num_recognised == 2


def test_cache_is_bounded_and_drops_the_oldest(sign):
    reader = CountingReader(detect=False, num_threads=1, cache_size=2)
    first, second, third = sign("11"), sign("22"), sign("33")
    reader.read([first, second])
    reader.read([first])  # now the second is the oldest
    reader.read([third])
    assert reader.num_recognised == 3
    reader.read([first, third])
    assert reader.num_recognised == 3
    assert reader.read([second]) == ["22"]
    assert reader.num_recognised == 4


def test_threads_share_one_recognition(sign):
    reader = CountingReader(detect=False, num_threads=1)
    images, found = [sign(n) for n in NUMBERS], []
    threads = [threading.Thread(target=lambda: found.append(reader.read(images))) for _ in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [NUMBERS] * 3
    assert reader.num_recognised == len(NUMBERS)


def test_modes_share_a_reader_and_building_loads_nothing():
    shared_reader.cache_clear()
    ocr.build(ocr.Config())
    assert shared_reader.cache_info().currsize == 0
    assert shared_reader(False, 1) is shared_reader(False, 1)
    assert shared_reader(False, 1) is not shared_reader(False, 2)


def test_colours_are_handed_over_as_blue_green_red():
    assert _bgr(Image.new("RGB", (1, 1), (1, 2, 3))).tolist() == [[[3, 2, 1]]]


def test_works_offline_and_silently(monkeypatch, caplog, sign):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked for")

    # Its logger does not propagate and keeps the first stderr it saw: listen at the source.
    monkeypatch.setattr(logging.getLogger("RapidOCR"), "handlers", [caplog.handler])
    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("requests.Session.request", refuse)
    assert "HELL" in Reader(detect=True, num_threads=1).read([sign("HELLO", (110, 60))])[0]
    assert Reader(detect=False, num_threads=2).read([sign("47")]) == ["47"]
    assert caplog.records == []


def test_refuses_what_is_no_image(soft):
    with pytest.raises(TypeError, match="not str"):
        soft(['"47"'], ["47"])


@pytest.mark.parametrize("bad", [{"mode": "strict"}, {"num_threads": 0}, {"detct": True}])
def test_config_is_strict(bad):
    with pytest.raises(ValidationError):
        ocr.Config(**bad)
