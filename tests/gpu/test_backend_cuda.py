"""The diffusion backend on CUDA, with random networks of toy size."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_diffusion
from benchmarks.gpu_models import (
    METHODS,
    SIZES,
    TOYS,
    Variant,
    build_backend,
    load_recipe,
    requests_for,
)
from diffusion.attention import available_backends
from mmrl.replay_gaps import refuse_gap
from mmrl.weights import trainable

pytestmark = pytest.mark.gpu
GROUP = 4
LOGP = frozenset({"logp"})


def made(device, model="sd35", method="awm", **variant):
    """A toy backend and its recipe."""
    kind, size = Variant(**variant), TOYS[model]
    run = load_recipe(size, method, kind, GROUP, 1000)
    return build_backend(run, size, kind, device, GROUP), run


def rolled_out(backend, run):
    return list(backend.rollout(requests_for(run, GROUP, 0)))


def batch_of(backend, run, groups, device):
    """All decisions of all samples."""
    (batch,) = gpu_diffusion.update_batches(run, backend, groups, GROUP, device)
    return batch


def working(device):
    return [a.name for a in available_backends(device) if a.works and a.name != "sdpa"]


@pytest.mark.parametrize("model", SIZES)
def test_attention_kernels_agree_with_sdpa(device, model):
    reference, run = made(device, model)
    batch = batch_of(reference, run, rolled_out(reference, run), device)
    expected = reference.evaluate(batch, LOGP).logp
    names = working(device)
    assert names, "neither xformers nor flash works here: auto would silently be sdpa"
    for name in names:
        found = made(device, model, attention=name)[0].evaluate(batch, LOGP).logp
        # Two bf16 layers: relative errors of 2^-8 each, averaged over 256 latent dimensions.
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_a_kernel_that_ignored_the_text_would_be_noticed(device):
    backend, run = made(device)
    batch = batch_of(backend, run, rolled_out(backend, run), device)
    expected = backend.evaluate(batch, LOGP).logp
    backend._conditions["0"].text.mul_(-1)
    changed = backend.evaluate(batch, LOGP).logp
    assert not torch.equal(changed, expected)


def replayed_gap(device, dtype):
    """Log-ratio of samples asked about twice, first without and then with gradients."""
    backend, run = made(device, dtype=dtype)
    batch = batch_of(backend, run, rolled_out(backend, run), device)
    with torch.no_grad():
        before = backend.evaluate(batch, LOGP).logp
    return backend.evaluate(batch, LOGP).logp.detach() - before


def test_ratio_is_exactly_one_without_an_update(device):
    gap = replayed_gap(device, "fp32")
    assert torch.equal(gap.exp(), torch.ones_like(gap))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_replays_within_the_budget_of_the_preflight(device, dtype):
    refuse_gap(float(replayed_gap(device, dtype).abs().max()), dtype)


def test_the_same_noise_and_nearly_the_same_latents_as_on_cpu(device):
    torch.backends.cuda.matmul.allow_tf32 = False
    on_cuda, run = made(device, dtype="fp32")
    on_cpu, _ = made(torch.device("cpu"), dtype="fp32")
    on_cuda.model.load_state_dict(on_cpu.model.state_dict())
    latents = [rolled_out(backend, run)[0].payload.x0 for backend in (on_cuda, on_cpu)]
    # float32 sums in another order, over a few steps; other noise would differ by about 1.
    torch.testing.assert_close(*latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_an_update_moves_the_adapter_alone(device, model, method):
    backend, run = made(device, model, method)
    groups = rolled_out(backend, run)
    before = {n: p.detach().clone() for n, p in backend.model.named_parameters()}
    trained = trainable(backend.model)
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    batch = batch_of(backend, run, groups, device)
    assert gpu_diffusion.update(run, backend, optimizer, [batch]) > 0
    moved = {n for n, p in backend.model.named_parameters() if not torch.equal(before[n], p.data)}
    assert moved
    assert moved <= trained.keys()


@pytest.mark.parametrize(
    ("model", "method", "decisions", "least", "most"),
    [("sd35", "awm", 6, 4, 20), ("flux", "flow-grpo", 1, 22, 60)],
)
def test_one_step_at_full_size_fits(device, model, method, decisions, least, most):
    """GiB between that of the frozen weights and what a step needs at most."""
    free, total = torch.cuda.mem_get_info(device)
    if free < most * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free; a step needs up to {most}")
    size, variant = SIZES[model], Variant(checkpointing=True)
    run = load_recipe(size, method, variant, 1, decisions)
    found = gpu_diffusion.measure(run, variant, size, device, repeats=1)
    assert found.peak is not None
    assert least * 2**30 < found.peak < min(total, most * 2**30)
