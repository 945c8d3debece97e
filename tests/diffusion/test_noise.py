"""Noise belongs to a sample, whoever draws it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusion.noise import normal
from mmrl.noise import NoiseKey, generator

KEY = NoiseKey(seed=1, stream=2, prompt_id="p", sample=3)


def draw(key, purpose="initial"):
    return torch.rand(4, generator=key.generator(purpose))


def test_the_same_name_gives_the_same_numbers():
    assert torch.equal(draw(KEY), draw(replace(KEY)))


@pytest.mark.parametrize("change", [{"seed": 2}, {"stream": 3}, {"prompt_id": "q"}, {"sample": 4}])
def test_every_part_of_the_name_matters(change):
    assert not torch.equal(draw(KEY), draw(replace(KEY, **change)))
    assert not torch.equal(draw(KEY), draw(KEY, "likelihood"))


def test_borders_between_parts_matter():
    seeds = {generator(0, 0, *parts).initial_seed() for parts in [("a", "bc"), ("ab", "c")]}
    assert len(seeds) == 2


def test_the_seed_of_a_name_is_fixed_for_ever():
    # A change here changes every sample of every run: resumed runs would not match.
    assert generator(0, 0, "initial", "id", 0).initial_seed() == 875627514983100399


def test_rows_do_not_depend_on_their_neighbours():
    keys = [replace(KEY, sample=index) for index in range(5)]
    together = normal(keys, "initial", (2, 3))
    apart = [normal([key], "initial", (2, 3)) for key in keys]
    assert torch.equal(together, torch.cat(apart))
    assert len({float(row.sum()) for row in together}) == 5
