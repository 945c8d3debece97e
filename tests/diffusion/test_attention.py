"""Attention kernels: choice, refusals, and equality of our joint attention with diffusers'."""

from __future__ import annotations

import pytest
import torch

from diffusion.attention import (
    KERNELS,
    Availability,
    JointAttention,
    apply_attention,
    available_backends,
    pick_attention,
    sdpa,
)
from mmrl.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["xformers", "flash"])
def test_asking_for_a_gpu_kernel_on_a_cpu_is_refused(name):
    with pytest.raises(UserError, match=rf"model.attention = '{name}'.*CUDA.*'cpu'.*auto, sdpa"):
        pick_attention(name, CPU)


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_a_cpu_uses_sdpa(name):
    assert pick_attention(name, CPU, torch.float32).name == "sdpa"


def test_the_list_for_doctor_gives_reasons():
    found = {name: (works, reason) for name, works, reason in available_backends(CPU)}
    assert {name: works for name, (works, _) in found.items()} == {
        "xformers": False,
        "flash": False,
        "sdpa": True,
    }
    assert all(reason for _, reason in found.values())


def test_a_broken_kernel_is_skipped_and_named(monkeypatch):
    def broken(*_):
        raise RuntimeError("no operator\nand a long list of why")

    monkeypatch.setitem(KERNELS, "sdpa", broken)
    with pytest.raises(UserError, match="RuntimeError: no operator;"):
        pick_attention("sdpa", CPU)


def test_auto_takes_the_first_that_works(monkeypatch):
    def probe(name, device, dtype):
        return Availability(name, name != "xformers", "pretended")

    monkeypatch.setattr("diffusion.attention.probe", probe)
    assert pick_attention("auto", torch.device("cuda")).name == "flash"


def transformer(**options):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        **options,
    )


@pytest.mark.parametrize(
    "options", [{}, {"qk_norm": "rms_norm"}, {"dual_attention_layers": (0,), "qk_norm": "rms_norm"}]
)
def test_joint_attention_equals_the_processor_of_diffusers(options):
    network = transformer(**options)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 16),
        "timestep": torch.tensor([900.0, 100.0]),
        "return_dict": False,
    }
    theirs = network(**inputs)[0]
    network.set_attn_processor(JointAttention(sdpa))
    ours = network(**inputs)[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)

    def reversed_values(query, key, value):
        return sdpa(query, key, value.flip(2))

    network.set_attn_processor(JointAttention(reversed_values))
    assert (network(**inputs)[0] - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sdpa", "flash", "xformers"])
def test_apply_attention_reaches_every_block(name):
    network = transformer()
    apply_attention(network, name)
    kernels = {getattr(p, "kernel", sdpa) for p in network.attn_processors.values()}
    assert kernels == {KERNELS[name]}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_gpu_kernels_agree_with_sdpa(name):
    device = torch.device("cuda")
    if not pick_attention("auto", device).works or not dict(
        (found.name, found.works) for found in available_backends(device)
    ).get(name):
        pytest.skip(f"{name} does not work here")
    query, key, value = torch.randn(3, 2, 4, 50, 64, device=device, dtype=torch.bfloat16)
    expected = sdpa(query.float(), key.float(), value.float())
    found = KERNELS[name](query, key, value).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # bf16: 8 bits of mantissa
