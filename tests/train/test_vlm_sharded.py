"""Two processes that share the weights of a vision-language model (FSDP2), one without a picture.

They gather the same weights in the same order, or they would wait for each other for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from toy.run import ROOT, python

sys.path.insert(0, str(ROOT / "tests" / "vlm"))

from tiny_vlm import FAMILIES, make_backend, save_films, save_model

from mmrl.distributed import one_group_of_processes
from mmrl.text.layout import Row
from mmrl.types import UpdateBatch
from mmrl.weights import trainable

SHARES = (("mixed", "one"), ("none",))
"""Prompts of the two processes: with a video and an image, with an image; of text alone."""


TRAINED = {"qwen2_5_vl": False, "qwen3_vl": True}
"""Whether the tower is trained; its weights are shared either way."""


def build(folder: Path, family: str):
    prompts = save_films(folder)
    model = {"train_vision": TRAINED[family], "lora": None}
    return make_backend(folder / family, family, prompts, model=model)


def losses(backend, names) -> torch.Tensor:
    rows = [Row(prompt=backend._prompts[name], completion=[9, 11, 13]) for name in names]
    batch = UpdateBatch(
        payload=rows,
        mask=torch.ones(len(rows), 3, dtype=torch.bool),
        advantages=torch.ones(len(rows), dtype=torch.float64),
        weights=torch.ones(len(rows), dtype=torch.float64),
    )
    return backend.evaluate(batch, frozenset({"logp"})).logp.sum()


def shard(model: torch.nn.Module) -> None:
    """Each block apart, and the rest."""
    for module in model.modules():
        if type(module).__name__.endswith(("VisionBlock", "DecoderLayer")):
            fully_shard(module)
    fully_shard(model)


def main(folder: Path) -> None:
    """Write the gradients of each family."""
    torch.distributed.init_process_group("gloo")
    init_device_mesh("cpu", (2,))
    rank = torch.distributed.get_rank()
    for family, train_vision in TRAINED.items():
        backend = build(folder / str(rank), family)
        shard(backend.model)
        with torch.no_grad():  # as an anchor does
            losses(backend, SHARES[rank])
        losses(backend, SHARES[rank]).backward()
        live = trainable(backend.model)
        found = {name: 2 * p.grad.full_tensor() for name, p in live.items()}  # it averages
        assert any(".visual." in name for name in found) == train_vision
        if rank == 0:
            save_file(found, folder / f"{family}.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("sharded")
    for rank in "01":
        for family in FAMILIES:
            save_model(found / rank / family, family)
    done = python(Path(__file__).resolve(), found, processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_one_process(folder, family):
    found = load_file(folder / f"{family}.safetensors")
    backend = build(folder / "0", family)
    losses(backend, [name for names in SHARES for name in names]).backward()
    expected = {name: p.grad for name, p in trainable(backend.model).items()}
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4, msg=name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with one_group_of_processes():
        main(Path(sys.argv[1]))
