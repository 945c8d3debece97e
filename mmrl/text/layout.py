"""Completions and their prompts, laid out one after another in a single row of tokens.

A tree is a prompt and the completions that follow from it.  In the row stand the prompt, then its
completions, then the next tree; no token is padding.  A completion sees its prompt and itself, and
its positions go on where the prompt ends, so it is scored as if it stood there alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sample: token ids of its ``prompt`` and of its ``completion``, neither of them empty."""

    prompt: Sequence[int]
    completion: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Tree:
    """Where in the row its prompt starts, and ``lengths``: of the prompt, then each completion."""

    start: int
    lengths: tuple[int, ...]

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """(start, stop) of the prompt and of each completion."""
        edges = list(accumulate(self.lengths, initial=self.start))
        return list(pairwise(edges))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``tokens`` and ``positions`` [1, L] of a row of ``trees``.

    Of the M tokens of all completions: ``before`` [M], the place in the row of the token whose
    hidden state predicts it; ``targets`` [M], its id; ``sample`` and ``index`` [M], whose it is and
    the how-many-th.
    """

    tokens: Tensor
    positions: Tensor
    trees: tuple[Tree, ...]
    before: Tensor
    targets: Tensor
    sample: Tensor
    index: Tensor

    def unpack(self, values: Tensor, shape: torch.Size | tuple[int, int]) -> Tensor:
        """``values`` [M] as [B, K], 0 where a sample has no such token."""
        empty = torch.zeros(shape, dtype=values.dtype, device=values.device)
        return empty.index_put((self.sample, self.index), values)

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return Layout(**tensors, trees=self.trees)


def lay_out(rows: Sequence[Row], *, share_prompts: bool) -> Layout:
    """The layout of some samples, numbered in their order.

    ``share_prompts``: samples with equal prompts, wherever they stand, become one tree.
    """
    families: dict[object, list[int]] = {}
    for number, row in enumerate(rows):
        families.setdefault(tuple(row.prompt) if share_prompts else number, []).append(number)
    tokens: list[int] = []
    positions: list[int] = []
    trees: list[Tree] = []
    found: list[tuple[int, int, int, int]] = []
    for members in families.values():
        prompt = rows[members[0]].prompt
        start, last = len(tokens), len(tokens) + len(prompt) - 1
        tokens += prompt
        positions += range(len(prompt))
        for number in members:
            completion, first = rows[number].completion, len(tokens)
            tokens += completion
            positions += range(len(prompt), len(prompt) + len(completion))
            found += [
                (last if k == 0 else first + k - 1, token, number, k)
                for k, token in enumerate(completion)
            ]
        lengths = (len(prompt), *(len(rows[number].completion) for number in members))
        trees.append(Tree(start=start, lengths=lengths))
    before, targets, sample, index = torch.tensor(found).unbind(1)
    return Layout(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        trees=tuple(trees),
        before=before,
        targets=targets,
        sample=sample,
        index=index,
    )
