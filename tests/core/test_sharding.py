"""Parts of parameters that ZeRO 3 holds: flattened, padded, one row for each process."""

from __future__ import annotations

import pytest
import torch

from mmrl.sharding import Flattened, part_of, trainable, whole, write

CPU = torch.device("cpu")


def row_of(parts, rank, size, padding):
    """What DeepSpeed's process ``rank`` holds: never written beyond the end."""
    row = torch.full((size,), padding)
    row[: len(parts[rank])] = parts[rank]
    return row


@pytest.mark.parametrize(
    ("shape", "world", "lengths"),
    [((2, 3), 2, [3, 3]), ((7,), 3, [3, 3, 1]), ((), 3, [1, 0, 0]), ((2, 2), 3, [2, 2, 0])],
)
def test_parts_are_consecutive_and_lose_no_element(monkeypatch, shape, world, lengths):
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    layout = Flattened(value.shape, CPU, None)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda _: world)
    parts, gathered = [], []
    for rank in range(world):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda _, rank=rank: rank)
        parts.append(layout.cut(value))
        row = row_of(parts, rank, lengths[0], float("nan"))
        assert torch.equal(layout.trim(row), parts[-1])
        assert layout.pad(parts[-1]).shape == row.shape
    assert [len(part) for part in parts] == lengths
    assert torch.equal(torch.cat(parts), value.flatten())

    def all_gather(rows, row, group):
        gathered.append(row)
        rows.copy_(torch.cat([layout.pad(part) for part in parts]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", all_gather)
    assert torch.equal(layout.gather(parts[-1]), value)
    assert torch.equal(gathered[0], layout.pad(parts[-1]))


def test_whole_values_are_copies_and_parts_are_not():
    module = torch.nn.Linear(2, 1, bias=False)
    before = whole(trainable(module))
    with torch.no_grad():
        part_of(module.weight).add_(1.0)
    assert not torch.equal(before["weight"], module.weight)
    write(trainable(module), before)
    assert torch.equal(before["weight"], module.weight)
    assert whole(trainable(module), keep=False) == {}
