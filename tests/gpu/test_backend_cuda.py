"""The diffusion backend on CUDA, with a random network of toy size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_sd35 import (
    MEDIUM,
    TOY,
    Variant,
    build_backend,
    load_recipe,
    measure,
    prompt,
    update_batch,
)
from diffusion.attention import available_backends
from mmrl.preflight import refuse_gap
from mmrl.trainer import make_requests

pytestmark = pytest.mark.gpu
GROUP = 4
LOGP = frozenset({"logp"})


def made(device, **variant):
    """A toy backend."""
    kind = Variant(**variant)
    run = load_recipe(TOY, kind, GROUP, GROUP)
    return build_backend(run, TOY, kind, device)


def rolled_out(backend):
    (group,) = backend.rollout(make_requests([prompt()], GROUP, 7, 0))
    return group


def working(device):
    return [a.name for a in available_backends(device) if a.works and a.name != "sdpa"]


def test_attention_kernels_agree_with_sdpa(device):
    reference = made(device)
    group = rolled_out(reference)
    batch = update_batch(reference, group, GROUP, device)
    expected = reference.evaluate(batch, LOGP).logp
    names = working(device)
    assert names, "neither xformers nor flash works here: auto would silently be sdpa"
    for name in names:
        found = made(device, attention=name).evaluate(batch, LOGP).logp
        # Two bf16 layers: relative errors of 2^-8 each, averaged over 256 latent dimensions.
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_a_kernel_that_ignored_the_text_would_be_noticed(device):
    backend = made(device)
    batch = update_batch(backend, rolled_out(backend), GROUP, device)
    expected = backend.evaluate(batch, LOGP).logp
    condition = backend._conditions[prompt().id]
    condition.text.mul_(-1)
    changed = backend.evaluate(batch, LOGP).logp
    assert not torch.equal(changed, expected)


def replayed_gap(device, dtype):
    """Log-ratio of samples asked about twice, first without and then with gradients."""
    backend = made(device, dtype=dtype)
    batch = update_batch(backend, rolled_out(backend), GROUP, device)
    with torch.no_grad():
        before = backend.evaluate(batch, LOGP).logp
    return backend.evaluate(batch, LOGP).logp.detach() - before


def test_ratio_is_exactly_one_without_an_update(device):
    gap = replayed_gap(device, "fp32")
    assert torch.equal(gap.exp(), torch.ones_like(gap))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_replays_within_the_budget_of_the_preflight(device, dtype):
    refuse_gap(replayed_gap(device, dtype), dtype)


def test_the_same_noise_and_nearly_the_same_latents_as_on_cpu(device):
    torch.backends.cuda.matmul.allow_tf32 = False
    cpu = torch.device("cpu")
    on_cuda, on_cpu = made(device, dtype="fp32"), made(cpu, dtype="fp32")
    on_cuda.model.load_state_dict(on_cpu.model.state_dict())
    latents = [rolled_out(backend).payload.x0 for backend in (on_cuda, on_cpu)]
    # float32 sums in another order, over a few steps; other noise would differ by about 1.
    torch.testing.assert_close(*latents, rtol=1e-3, atol=1e-3)


def test_one_step_at_full_size_fits(device):
    free, total = torch.cuda.mem_get_info(device)
    if free < 20 * 2**30:
        pytest.skip(f"{free / 2**30:.0f} GiB are free; a step needs up to 20")
    found = measure(Variant(checkpointing=True), MEDIUM, device, 1, 1, repeats=1)
    assert found.peak is not None
    assert 4 * 2**30 < found.peak < min(total, 20 * 2**30)
