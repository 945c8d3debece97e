"""Random streams that depend on what is drawn, not on who draws it.

A stream is named by (seed, step, purpose, prompt, sample).  Generators live on the CPU, where they
give the same numbers on every machine, so neither the number of processes nor the size of a
micro-batch nor the device changes a sample.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """Names the noise of one sample: run ``seed``, ``stream`` (step), prompt id, sample index."""

    seed: int
    stream: int
    prompt_id: str
    sample: int

    def generator(self, purpose: str) -> torch.Generator:
        """A fresh generator for one ``purpose`` of this sample."""
        return generator(self.seed, self.stream, purpose, self.prompt_id, self.sample)

    def of_group(self) -> NoiseKey:
        """The key that all samples of this one's group have in common."""
        return replace(self, sample=0)

    def shared_generator(self, purpose: str, shared_by: str) -> torch.Generator:
        """A generator for what a whole "step", a "group" or only this "sample" draws."""
        scope: dict[str, list[str | int]] = {
            "step": [],
            "group": [self.prompt_id],
            "sample": [self.prompt_id, self.sample],
        }
        return generator(self.seed, self.stream, purpose, *scope[shared_by])


def generator(seed: int, stream: int, purpose: str, *rest: str | int) -> torch.Generator:
    """A CPU generator seeded by a hash of all arguments."""
    # repr keeps types and borders apart: ("a", "bc") and ("ab", "c") differ, so do 1 and "1".
    text = repr((seed, stream, purpose, *rest)).encode()
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)
