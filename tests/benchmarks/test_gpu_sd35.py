"""The GPU benchmark at toy size on the CPU, and what it counts."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_sd35
from benchmarks.gpu_sd35 import MEDIUM, TOY, Measured, Variant, Work
from benchmarks.rates import count_flops, matmul_rate

TINY = ["--tiny", "--device", "cpu", "--rollout-images", "2", "--update-images", "2",
        "--repeats", "1"]  # fmt: skip


# The compiler looks at .grad of tensors inside the graph, and its own warning would end it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(("backend", "variants"), [("none", 2), ("eager", 4)])
def test_toy_run_measures_every_variant(backend, variants, tmp_path, capsys):
    assert gpu_sd35.main([*TINY, "--out", str(tmp_path), "--compile-backend", backend]) == 0
    (found,) = tmp_path.glob("*-gpu-sd35.json")
    data = json.loads(found.read_text())
    assert len(data["variants"]) == variants
    assert all(v["rollout"] > 0 and v["update"] > 0 for v in data["variants"])
    assert {v["variant"]["checkpointing"] for v in data["variants"]} == {True, False}
    assert data["flops_per_image"]["update"] > data["flops_per_image"]["rollout"] > 0
    assert "numbers mean nothing" in found.with_suffix(".md").read_text()
    assert "rollout s/image" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--device", "cpu"], [*TINY, "--attention", "spda"],
                                       [*TINY, "--attention", "flash"]])  # fmt: skip
def test_refusals_are_one_line(arguments, tmp_path, capsys):
    assert gpu_sd35.main([*arguments, "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_refuses(capsys):
    assert gpu_sd35.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_medium_has_the_published_size():
    network = gpu_sd35.random_transformer(MEDIUM, torch.bfloat16, torch.device("meta"))
    # That of the released transformer; its table of positions is a buffer.
    assert sum(p.numel() for p in network.parameters()) == 2_243_171_520
    family = gpu_sd35.PipelinelessSD3(network, torch.device("meta"))
    assert family.latent_shape(MEDIUM.pixels, MEDIUM.pixels) == (16, 64, 64)


def test_counted_work_agrees_with_a_hand_count():
    # Products of a block, as multiples of width^2: 12 for each token of either stream, 4 more for
    # image tokens of the 13 dual blocks; attention 2 width for each pair of tokens.
    width, image, text, layers, dual = 1536, 1024, 333, 24, 13
    dense = layers * 12 * (image + text) * width**2 + dual * 4 * image * width**2
    pairs = layers * (image + text) ** 2 + dual * image**2
    forward = 2 * (dense + 2 * width * pairs)
    work = gpu_sd35.count_work(MEDIUM)
    # Adapters of rank 32 add about 1 %, embeddings and modulation less.
    assert work.rollout / 14 == pytest.approx(forward, rel=0.03)
    # 6 noise levels, each: policy, reference and average forward; backward through the inputs
    # of frozen products costs another forward, and a second one for attention alone.
    assert 6 * 3.9 * forward < work.update < 6 * 4.5 * forward


def test_update_moves_the_adapter_on_cpu():
    run = gpu_sd35.load_recipe(TOY, Variant(), 2, 2)
    device = torch.device("cpu")
    backend = gpu_sd35.build_backend(run, TOY, Variant(), device)
    group = next(backend.rollout(gpu_sd35.make_requests([gpu_sd35.prompt()], 2, 0, 0)))
    batch = gpu_sd35.update_batch(backend, group, 3, device)
    trained = {n: p for n, p in backend.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    gpu_sd35.update(run, backend, torch.optim.AdamW(trained.values(), lr=0.1), batch)
    assert batch.advantages.tolist() == [1.0, -1.0, 1.0]
    assert any(not torch.equal(before[name], p) for name, p in trained.items())


def test_shares_are_work_over_time_and_rate():
    measured = Measured(variant=Variant(), rollout=2.0, update=4.0)
    assert gpu_sd35._shares(measured, Work(rollout=100, update=300), 1000.0) == ["0.050", "0.075"]
    assert gpu_sd35._shares(measured, Work(rollout=100, update=300), None) == ["-", "-"]


def test_peak_rates_are_found_by_name():
    assert gpu_sd35.peak_rate("NVIDIA H200") == 989e12
    assert gpu_sd35.peak_rate("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_sd35.peak_rate("NVIDIA H100 PCIe") is None
    assert gpu_sd35.peak_rate(None) is None


def test_counts_the_textbook_number_of_operations():
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7


def test_matmul_rate_is_positive_and_finite():
    rate = matmul_rate((32, 32, 32), torch.float32, torch.device("cpu"), min_seconds=0.01)
    assert 0 < rate < 1e18
