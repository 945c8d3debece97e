"""What the tower of the tiny vision-language model is taught is what stands in the picture."""

from __future__ import annotations

import random

import torch

from assets import tower_warm_up
from assets.build_tiny_qwen_vl import make_network, make_processor
from assets.tiny_qwen import make_tokenizer
from assets.tower_warm_up import CELLS, IGNORED, KINDS, LENGTH, LETTERS, Reader, labelled, warm_up
from rewards._shapes import view


def test_labels_are_those_of_the_picture():
    rng = random.Random(0)
    pictures = [labelled(rng) for _ in range(60)]
    signs = [picture for picture in pictures if picture.cells == [IGNORED] * CELLS]
    scenes = [picture for picture in pictures if picture.letters == [IGNORED] * LENGTH]
    assert len(signs) + len(scenes) == 60
    assert len(signs) > len(scenes) > 10
    for picture in scenes:
        found = [0] * CELLS
        for blob in view(picture.image).blobs:
            x, y = (blob.box[0] + blob.box[2]) / 2, (blob.box[1] + blob.box[3]) / 2
            place = int(2 * y) * 4 + int(2 * x)  # in fractions of the height, that of two cells
            found[place] = KINDS.index((blob.shape, blob.colour))
        assert picture.cells == found
    texts = {"".join(LETTERS[i] for i in picture.letters).strip() for picture in signs}
    assert len(texts) > 20
    assert all(text.isdigit() or text.isupper() for text in texts)


def test_a_cell_is_read_from_its_own_token():
    reader = Reader(6)
    tokens = torch.randn(2, CELLS, 6)
    other = tokens.clone()
    other[:, 3] += 1.0
    cells, places, text = reader(tokens)
    assert cells.shape == (2, CELLS, len(KINDS))
    assert places.shape == (2, CELLS, CELLS)
    assert text.shape == (2, LENGTH, len(LETTERS))
    moved = (reader(other)[0] - cells).abs().amax((0, 2)) > 0
    assert moved.tolist() == [place == 3 for place in range(CELLS)]


def test_a_tower_learns_to_see(monkeypatch):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["What colour is the circle? red"], 300)
    network = make_network(tokenizer)
    told: list[str] = []
    monkeypatch.setattr(tower_warm_up, "BATCH", 24)
    rest = {n: p.clone() for n, p in network.model.language_model.named_parameters()}
    warm_up(network.model.visual, make_processor(tokenizer), steps=100, seed=0, log=told.append)
    first, last = (float(line.split("cells ")[1].split(",")[0]) for line in told)
    assert last > first
    assert last > 0.7  # nothing is in the most cells: about 0.69 of them
    for name, value in network.model.language_model.named_parameters():
        assert torch.equal(value, rest[name])
