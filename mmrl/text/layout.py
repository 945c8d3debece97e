"""Completions and their prompts, laid out one after another in a single row of tokens.

A tree is a prompt and the completions that follow from it.  In the row stand the prompt, then its
completions, then the next tree; no token is padding.  A completion sees its prompt and itself, and
its positions go on where the prompt ends, so it is scored as if it stood there alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """A prompt as a network reads it; the same object stands for the same prompt.

    ``positions`` [A, P]: of each token, in the A axes that the network's positions have: one for
    texts.  ``after``: the position that follows, in every axis.  ``inputs``: further tensors, such
    as pixels, which stand one after another where there are several prompts.
    """

    ids: Sequence[int]
    positions: Tensor
    after: int
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of_text(ids: Sequence[int]) -> Encoded:
        """Tokens one after another."""
        return Encoded(ids=ids, positions=torch.arange(len(ids))[None], after=len(ids))

    def positions_with(self, length: int) -> Tensor:
        """[A, P + ``length``]: of its tokens and those of a completion."""
        following = torch.arange(self.after, self.after + length)
        return torch.cat([self.positions, following.expand(len(self.positions), -1)], dim=1)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sample: its ``prompt`` and the token ids of its ``completion``, neither of them empty.

    ``logp_sampled``: of each token, where it was sampled.
    """

    prompt: Encoded
    completion: Sequence[int]
    logp_sampled: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Tree:
    """``lengths`` in the row: of the prompt, then of each completion."""

    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``tokens`` [1, L] of a row of ``trees``, with ``positions`` [A, 1, L] and further ``inputs``.

    Of the M tokens of all completions: ``before`` [M], the place in the row of the token whose
    hidden state predicts it; ``targets`` [M], its id; ``sample`` and ``index`` [M], whose it is and
    the how-many-th.
    """

    tokens: Tensor
    positions: Tensor
    inputs: Mapping[str, Tensor]
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
        moved = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        return Layout(**moved, inputs=inputs, trees=self.trees)


def lay_out(rows: Sequence[Row], *, share_prompts: bool) -> Layout:
    """The layout of some samples, numbered in their order.

    ``share_prompts``: samples of the same prompt, wherever they stand, become one tree.
    """
    families: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        families.setdefault(id(row.prompt) if share_prompts else number, []).append(number)
    tokens: list[int] = []
    positions: list[Tensor] = []
    trees: list[Tree] = []
    found: list[tuple[int, int, int, int]] = []
    for members in families.values():
        prompt = rows[members[0]].prompt
        tokens += prompt.ids
        last = len(tokens) - 1
        positions.append(prompt.positions)
        for number in members:
            completion, first = rows[number].completion, len(tokens)
            tokens += completion
            positions.append(prompt.positions_with(len(completion))[:, len(prompt.ids) :])
            found += [
                (last if k == 0 else first + k - 1, token, number, k)
                for k, token in enumerate(completion)
            ]
        lengths = (len(prompt.ids), *(len(rows[number].completion) for number in members))
        trees.append(Tree(lengths=lengths))
    before, targets, sample, index = torch.tensor(found).unbind(1)
    return Layout(
        tokens=torch.tensor([tokens]),
        positions=torch.cat(positions, dim=1)[:, None],
        inputs=joined([rows[members[0]].prompt for members in families.values()]),
        trees=tuple(trees),
        before=before,
        targets=targets,
        sample=sample,
        index=index,
    )


def joined(prompts: Sequence[Encoded]) -> dict[str, Tensor]:
    """Further inputs of some prompts, one after another; a prompt may lack some."""
    names = dict.fromkeys(name for prompt in prompts for name in prompt.inputs)
    return {
        name: torch.cat([prompt.inputs[name] for prompt in prompts if name in prompt.inputs])
        for name in names
    }


def for_network(positions: Tensor) -> Tensor:
    """[A, B, L] as networks take them: without the axis where it is the only one."""
    return positions[0] if len(positions) == 1 else positions
