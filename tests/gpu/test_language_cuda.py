"""The language backends on CUDA: each attention kernel against sdpa, with random networks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_language as benchmark
from benchmarks import gpu_language_models as models
from benchmarks.gpu_language_models import SIZES, TOYS, Variant
from mmrl.text.attention import prepare
from mmrl.text.kernels import Heads, pick_attention, probe
from mmrl.text.layout import Encoded, Row, lay_out
from mmrl.weights import trainable

pytestmark = pytest.mark.gpu
OTHERS = ("flash", "xformers", "flex")
HALF = (torch.bfloat16, torch.float16)
HEADS = {"flat": Heads(4, 4, 64), "grouped": Heads(8, 2, 128)}


def skip_unless_it_works(name, device, dtype=torch.bfloat16, heads=None):
    found = probe(name, device, dtype, heads or Heads())
    if not found.works:
        pytest.skip(f"{name}: {found.reason}")


def rows(*trees):
    """Samples of trees given as lengths of a prompt and its completions."""
    made = []
    for first, *completions in trees:
        prompt = Encoded.of_text([5] * first)
        made += [Row(prompt=prompt, completion=[7] * length) for length in completions]
    return made


LAYOUTS = {
    "several trees": rows((3, 2, 1, 4), (1, 5), (6, 1, 1)),
    "one token each": rows((1, 1)),
    "longer than a block": rows((300, 200, 1, 140), (64, 128)),
}


def attended(name, samples, share, inputs, slopes, scale=0.1):
    """Output and gradients of a row, in float32."""
    layout = lay_out(samples, share_prompts=share).to(inputs[0].device)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    groups = leaves[0].shape[1] // leaves[1].shape[1]
    module = SimpleNamespace(num_key_value_groups=groups, is_causal=True)
    found = prepare(name, layout)(module, *leaves, scaling=scale)
    (found * slopes).sum().backward()
    return [found.detach().float(), *(leaf.grad.float() for leaf in leaves)]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("samples", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OTHERS)
def test_kernels_equal_sdpa(name, dtype, heads, samples, share, device):
    """As near to float32 as sdpa in half precision is, but for a factor of two."""
    skip_unless_it_works(name, device, dtype, heads)
    length = lay_out(samples, share_prompts=share).tokens.shape[1]
    generator = torch.Generator().manual_seed(0)
    exact = [
        torch.randn(1, n, length, heads.width, generator=generator).to(device, dtype).float()
        for n in (heads.heads, heads.groups, heads.groups, heads.heads)
    ]
    *inputs, slopes = exact
    slopes = slopes.transpose(1, 2)
    expected = attended("sdpa", samples, share, inputs, slopes)
    half, half_slopes = [x.to(dtype) for x in inputs], slopes.to(dtype)
    theirs = attended("sdpa", samples, share, half, half_slopes)
    mine = attended(name, samples, share, half, half_slopes)
    for truth, reference, found in zip(expected, theirs, mine, strict=True):
        bound = 2 * (reference - truth).norm() + 2**-8 * truth.norm()
        assert (found - truth).norm() < bound


@pytest.mark.parametrize("name", ["xformers", "flex"])
def test_float32_equals_sdpa_where_a_kernel_takes_it(name, device):
    heads = Heads(4, 2, 64)
    skip_unless_it_works(name, device, torch.float32, heads)
    samples = LAYOUTS["several trees"]
    length = lay_out(samples, share_prompts=True).tokens.shape[1]
    query, key, value, slopes = (
        torch.randn(1, n, length, heads.width, device=device) for n in (4, 2, 2, 4)
    )
    slopes = slopes.transpose(1, 2)
    pairs = zip(
        attended(name, samples, True, (query, key, value), slopes),
        attended("sdpa", samples, True, (query, key, value), slopes),
        strict=True,
    )
    for mine, theirs in pairs:
        # Kernels may multiply in TF32, with 10 bits of mantissa.
        assert (mine - theirs).norm() < 2**-9 * theirs.norm()


@pytest.mark.parametrize("name", OTHERS)
def test_layouts_of_other_lengths_are_not_confused(name, device):
    """One kernel after another on rows of many lengths, as micro-batches come: compiled code is
    used again where it fits.
    """
    heads = Heads(4, 2, 64)
    skip_unless_it_works(name, device, torch.bfloat16, heads)
    for length in (2, 40, 127, 128, 129, 300, 511, 40):
        samples = rows((length, length, 1, 3), (5, length))
        total = lay_out(samples, share_prompts=True).tokens.shape[1]
        query, key, value, slopes = (
            torch.randn(1, n, total, 64, device=device).bfloat16() for n in (4, 2, 2, 4)
        )
        slopes = slopes.transpose(1, 2)
        pairs = zip(
            attended(name, samples, True, (query, key, value), slopes),
            attended("sdpa", samples, True, (query, key, value), slopes),
            strict=True,
        )
        for mine, theirs in pairs:
            assert (mine - theirs).norm() < 2**-6 * theirs.norm()  # 8 bits of mantissa, twice


@pytest.mark.parametrize("update", ["shared_prompt", "packed"])
@pytest.mark.parametrize("tuning", benchmark.TUNING)
@pytest.mark.parametrize("model", SIZES)
@pytest.mark.parametrize("name", OTHERS)
def test_scores_and_gradients_of_a_network_are_those_of_sdpa(name, model, tuning, update, device):
    size, found = TOYS[model], []
    skip_unless_it_works(name, device, heads=Heads(2, 1, 16))
    for attention in ("sdpa", name):
        variant = Variant(tuning=tuning, update=update, attention=attention, checkpointing=True)
        backend = models.build_backend(size, variant, device)
        (batch,) = benchmark.update_batches(models.random_rows(size, 1), size.group, device)
        logp = backend.evaluate(batch, benchmark.LOGP).logp
        logp.sum().backward()
        slopes = [p.grad for p in trainable(backend.model).values() if p.grad is not None]
        found.append((logp.detach(), torch.cat([slope.flatten() for slope in slopes])))
    (expected, slope), (logp, gradient) = found
    torch.testing.assert_close(logp, expected, rtol=0, atol=0.02)  # bf16
    assert (gradient - slope).norm() < 0.05 * slope.norm()


def test_auto_is_a_kernel_for_whole_rows(device):
    assert pick_attention("auto", device).name in OTHERS


@pytest.mark.parametrize("model", SIZES)
def test_a_step_at_full_size_fits(model, device):
    """With adapters and checkpointing, on the first kernel that works here."""
    if torch.cuda.mem_get_info(device)[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB")
    size, name = SIZES[model], pick_attention("auto", device).name
    rows = models.random_rows(size, 1)
    variant = Variant(attention=name, checkpointing=True)
    work = benchmark.count_update(size, variant, rows)
    empty = benchmark.Measured(variant=variant, work=work)
    found = benchmark.measure_update(empty, size, rows, device, repeats=1)
    assert found.peak is not None
    assert 6 * 2**30 < found.peak < 40 * 2**30
