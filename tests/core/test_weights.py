"""Copies of weights: exact swaps, averages, and switching adapters off."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmrl.weights import Snapshot, ema_decay, evaluation_decay, reshard, trainable


def parameters(*values):
    return {str(i): torch.nn.Parameter(torch.tensor(v)) for i, v in enumerate(values)}


def test_swapping_restores_exactly_the_live_bits():
    live = parameters([0.1, float("nan"), -0.0], [1e-40])
    snapshot = Snapshot(live)
    with torch.no_grad():
        live["0"].add_(1 / 3)
    before = {name: value.detach().clone().view(torch.int32) for name, value in live.items()}
    with snapshot.applied(live):
        assert live["0"][0].item() == pytest.approx(0.1)
    after = {name: value.detach().view(torch.int32) for name, value in live.items()}
    assert all(torch.equal(before[name], after[name]) for name in live)


def test_a_copy_does_not_alias_what_it_copied():
    live = parameters([1.0])
    snapshot = Snapshot(live)
    with torch.no_grad():
        live["0"].fill_(2.0)
    assert snapshot.state()["0"].item() == 1.0
    with snapshot.applied(live), torch.no_grad():
        live["0"].fill_(5.0)  # whatever happens inside is not written back into the copy
    assert (snapshot.state()["0"].item(), live["0"].item()) == (1.0, 2.0)


def test_swaps_nest_and_survive_an_exception():
    live = parameters([1.0])
    one = Snapshot(live)
    with torch.no_grad():
        live["0"].fill_(2.0)
    two = Snapshot(live)
    with torch.no_grad():
        live["0"].fill_(3.0)
    with one.applied(live):
        with contextlib.suppress(KeyError), two.applied(live):
            assert live["0"].item() == 2.0
            raise KeyError
        assert live["0"].item() == 1.0
    assert live["0"].item() == 3.0


def test_moving_average():
    live = parameters([1.0, -4.0])
    snapshot = Snapshot(live)
    with torch.no_grad():
        live["0"].copy_(torch.tensor([3.0, 0.0]))
    snapshot.move_towards(live, 0.75)
    assert snapshot.state()["0"].tolist() == [0.75 * 1 + 0.25 * 3, 0.75 * -4]
    snapshot.move_towards(live, 0.0)
    assert torch.equal(snapshot.state()["0"], live["0"])


def test_decay_schedules():
    assert [ema_decay(step, 0.3, 0.001) for step in (0, 100, 299, 1000)] == [0, 0.1, 0.299, 0.3]
    assert evaluation_decay(0, 0.99) == 0.1
    assert evaluation_decay(8, 0.99) == 0.5
    assert evaluation_decay(10_000, 0.99) == 0.99


@pytest.mark.parametrize(
    ("max_decay", "rate", "start", "decays"),
    [
        (0.0, 0.001, 0, [0, 0, 0, 0, 0]),
        (0.5, 0.001, 0, [0, 0.074, 0.075, 0.208, 0.5]),
        (0.999, 0.0075, 75, [0, 0, 0, 0.9975, 0.999]),
    ],
)
def test_decay_types_of_diffusion_nft(max_decay, rate, start, decays):
    found = [ema_decay(step, max_decay, rate, start) for step in (0, 74, 75, 208, 1000)]
    assert found == pytest.approx(decays, abs=1e-12)


def test_loading_refuses_other_parameters():
    snapshot = Snapshot(parameters([1.0]))
    snapshot.load({"0": torch.tensor([7.0])})
    assert snapshot.state()["0"].item() == 7.0
    with pytest.raises(ValueError, match="another set"):
        snapshot.load({"1": torch.tensor([7.0])})


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of one process."""
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_forward_never_sees_weights_of_another_swap(mesh):
    """FSDP2 keeps gathered weights after a forward without a backward."""
    network = fully_shard(torch.nn.Linear(1, 1, bias=False), mesh=mesh)
    one = torch.ones(1, 1)

    def fill(value):
        with torch.no_grad():
            trainable(network)["weight"].fill_(value)

    fill(2.0)
    snapshot = Snapshot(trainable(network))
    fill(3.0)
    with torch.no_grad():
        assert network(one).item() == 3.0
        with snapshot.applied(trainable(network)):
            assert network(one).item() == 2.0
        reshard(network)
        assert network(one).item() == 3.0
    fill(5.0)
    snapshot.move_towards(trainable(network), 0.5)
    assert snapshot.state()["weight"].item() == 3.5
    assert type(snapshot.state()["weight"]) is torch.Tensor
    snapshot.load({"weight": torch.full((1, 1), 7.0)})
    with torch.no_grad(), snapshot.applied(trainable(network)):
        assert network(one).item() == 7.0


def test_frozen_parameters_are_not_trained():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    assert list(trainable(module)) == ["weight"]
