"""Attention kernels over rows of trees: choice, refusals, and equality with sdpa.

FlashAttention and xformers need CUDA, so here dense attention stands in for their kernels;
``tests/gpu`` runs these.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from stand_ins import install
from tiny_text import PROMPTS, make_backend, make_batch, make_config, make_requests, network

from mmrl.attention import Availability, probe
from mmrl.errors import UserError
from mmrl.schema import validate
from mmrl.text import kernels
from mmrl.text.attention import NAME, prepare, register
from mmrl.text.config import Config
from mmrl.text.estimate import describe
from mmrl.text.kernels import KERNELS, PREFERENCE, Heads, Spans, pick_attention
from mmrl.text.layout import Encoded, Row, lay_out
from mmrl.text.scoring import score_rows

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # named, never touched
OTHERS = ("flash", "xformers", "flex")
MODULE = SimpleNamespace(num_key_value_groups=2, is_causal=True)


def rows(*trees):
    """Samples of trees given as lengths of a prompt and its completions, prompts interleaved."""
    made = [
        [Row(prompt=prompt, completion=[7] * n) for n in completions]
        for first, *completions in trees
        for prompt in [Encoded.of_text([5] * first)]
    ]
    return [row for members in made for row in members]


LAYOUTS = {
    "several trees": rows((3, 2, 1, 4), (1, 5), (6, 1, 1)),
    "one completion": rows((4, 3)),
    "one token each": rows((1, 1)),
    "longer than a block": rows((100, 60, 1, 70), (40, 130)),
}
layouts = pytest.mark.parametrize("samples", LAYOUTS.values(), ids=LAYOUTS.keys())


@pytest.fixture
def stand_ins(monkeypatch):
    install(monkeypatch)


def attended(name, samples, share, groups=2, dtype=torch.float32):
    """Output and gradients of a random row under random weights."""
    layout = lay_out(samples, share_prompts=share)
    generator = torch.Generator().manual_seed(0)

    def normal(heads):
        shape = (1, heads, layout.tokens.shape[1], 8)
        return torch.randn(shape, generator=generator).to(dtype)

    inputs = [normal(heads).requires_grad_() for heads in (4, groups, groups)]
    module = SimpleNamespace(num_key_value_groups=4 // groups, is_causal=True)
    found = prepare(name, layout)(module, *inputs, scaling=0.4)
    assert found.shape == (1, layout.tokens.shape[1], 4, 8)
    slopes = normal(4).transpose(1, 2)
    return found.detach(), torch.autograd.grad((found * slopes).sum(), inputs)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("share", [True, False])
@layouts
def test_kernels_equal_sdpa(name, share, samples, stand_ins):
    expected, expected_gradients = attended("sdpa", samples, share)
    found, gradients = attended(name, samples, share)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("name", OTHERS)
def test_any_number_of_groups(name, groups, stand_ins):
    samples = LAYOUTS["several trees"]
    for mine, theirs in zip(
        attended(name, samples, True, groups)[1],
        attended("sdpa", samples, True, groups)[1],
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def visible(layout):
    """[L, L] which token sees which, by a loop over trees."""
    seen = torch.zeros(layout.tokens.shape[1], layout.tokens.shape[1], dtype=torch.bool)
    first = 0
    for tree in layout.trees:
        start, stop = first, first + tree.lengths[0]
        for length in tree.lengths:
            for row in range(first, first + length):
                seen[row, start:stop] = first > start
                seen[row, first : row + 1] = True
            first += length
    return seen


@pytest.mark.parametrize("name", ["sdpa", "flex", "flash", "xformers"])
@layouts
def test_a_token_sees_its_prompt_and_its_own_past_alone(name, samples, stand_ins):
    """By which values move which outputs, under weights that are nowhere 0."""
    layout = lay_out(samples, share_prompts=True)
    length = layout.tokens.shape[1]
    query, key = torch.zeros(2, 1, 1, length, length)
    value = torch.eye(length)[None, None]
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    found = prepare(name, layout)(module, query, key, value, scaling=1.0)[0, :, 0]
    expected = visible(layout)
    assert torch.equal(found > 0, expected)
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True))


def test_blocks_that_no_token_sees_are_left_out(monkeypatch):
    """A completion of one block sees no other: 1 + 3 x 2 blocks of 4 x 4 instead of 10."""
    masks = []

    def flex_attention(query, key, value, block_mask, scale, enable_gqa):
        masks.append(block_mask)
        return query

    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", flex_attention)
    layout = lay_out(rows((128, 128, 128, 128)), share_prompts=True)
    tokens = torch.zeros(1, 1, 512, 8)
    KERNELS["flex"](layout)(MODULE, tokens, tokens, tokens, scaling=1.0)
    assert masks[0].to_dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
    ]


def test_what_the_kernels_of_variable_length_are_given():
    spans = Spans.of(lay_out(rows((2, 1, 2), (1, 1)), share_prompts=True))
    assert spans.queries == [2, 1, 2, 1, 1]
    assert spans.seen == [2, 3, 4, 1, 2]
    assert spans.keys.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 5, 6]


@pytest.mark.parametrize("how", ["shared_prompt", "packed"])
@pytest.mark.parametrize("name", OTHERS)
def test_scores_of_a_network_and_their_gradients_equal_those_of_sdpa(name, how, stand_ins):
    register()
    found = []
    for attention in ("sdpa", name):
        model = network("qwen3")
        model.set_attn_implementation(NAME)
        terms = score_rows(
            model,
            LAYOUTS["several trees"],
            5,
            how=how,
            temperature=1.0,
            chunk=3,
            with_entropy=False,
            attention=attention,
        )
        terms.logp.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((terms.logp.detach(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert (found[1][1] - found[0][1]).norm() < 1e-5 * found[0][1].norm()


@pytest.mark.parametrize("name", OTHERS)
def test_a_layout_is_prepared_once_for_all_layers(name, stand_ins, monkeypatch):
    register()
    made = []
    build = KERNELS[name]
    monkeypatch.setitem(KERNELS, name, lambda layout: made.append(layout) or build(layout))
    model = network("llama")
    model.set_attn_implementation(NAME)
    score_rows(
        model, LAYOUTS["one completion"], 3, how="packed", temperature=1.0, chunk=3,
        with_entropy=False, attention=name,
    )  # fmt: skip
    assert model.config.num_hidden_layers == 2
    assert len(made) == 1


@pytest.mark.parametrize("name", KERNELS)
def test_norms_in_float32_do_not_change_the_dtype(name, stand_ins):
    """Full fine-tuning under autocast: queries and keys come out of their norms in float32."""
    layout = lay_out(LAYOUTS["several trees"], share_prompts=True)
    query, key, value = torch.randn(3, 1, 2, layout.tokens.shape[1], 8)
    module = SimpleNamespace(num_key_value_groups=1, is_causal=True)
    kernel = prepare(name, layout)
    found = kernel(module, query, key, value.bfloat16(), scaling=0.4)
    assert found.dtype == torch.bfloat16
    expected = kernel(module, query.bfloat16(), key.bfloat16(), value.bfloat16(), scaling=0.4)
    assert torch.equal(found, expected)


# Choice and refusals


@pytest.mark.parametrize("name", OTHERS)
def test_asking_for_a_gpu_kernel_on_a_cpu_is_refused_when_the_model_is_loaded(name, folders):
    with pytest.raises(UserError, match=rf"model.attention = '{name}'.*CUDA.*'cpu'.*auto, sdpa"):
        make_backend(folders["qwen3"], model={"attention": name})


@pytest.mark.parametrize(("name", "reason"), [("auto", "auto on cpu"), ("sdpa", "works on cpu")])
def test_a_run_and_mmrl_check_say_which_kernel_is_used(name, reason, folders):
    model = {"attention": name}
    notes = make_backend(folders["qwen3"], model=model).notes
    assert any(note.startswith(f"attention: sdpa ({reason}") for note in notes)
    lines = describe(make_config(folders["qwen3"], model=model))
    assert any(line.startswith(f"attention: {name}, here sdpa ({reason}") for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may work here")
def test_mmrl_check_says_what_does_not_work_here_and_goes_on(folders):
    lines = describe(make_config(folders["qwen3"], model={"attention": "flex"}))
    assert any(
        line.startswith("attention: model.attention = 'flex' does not work here") for line in lines
    )


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"model": {"path": "x", "attention": "flesh"}}, "attention.*flash"),
        (
            {"model": {"path": "x", "attention": "flex"}, "update": "padded"},
            "model.attention = 'flex' needs rows without padding.*allowed: auto, sdpa",
        ),
    ],
)
def test_sections_that_cannot_work(section, match):
    with pytest.raises(UserError, match=match):
        validate(Config, section, "backend")


@pytest.mark.parametrize("name", ["auto", "sdpa"])
def test_padded_rows_say_so(name, folders):
    backend = make_backend(folders["qwen3"], model={"attention": name}, update="padded")
    assert backend.attention == Availability("sdpa", True, "rows are padded")


def test_flash_in_float32_is_refused_by_what_to_change():
    with pytest.raises(UserError, match=r"'flash' does not work here: it takes bf16 and fp16"):
        pick_attention("flash", CUDA, torch.float32)


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    def attempt():
        raise ModuleNotFoundError("No module named 'xformers.ops'", name="xformers.ops")

    found = probe("xformers", attempt, CUDA, torch.bfloat16)
    assert not found.works
    assert found.reason == "No module named 'xformers.ops'; pip install --upgrade xformers"


@pytest.mark.parametrize("works", PREFERENCE)
def test_auto_takes_the_first_that_works(works, monkeypatch):
    tried = []

    def pretended(name, device, dtype, heads):
        tried.append(name)
        return Availability(name, name == works, "pretended")

    monkeypatch.setattr(kernels, "probe", pretended)
    assert pick_attention("auto", CUDA).name == works
    assert tuple(tried) == PREFERENCE[: PREFERENCE.index(works) + 1]


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_tried_forwards_and_backwards_with_the_heads_of_the_network(
    name, stand_ins, monkeypatch
):
    """With stand-ins, and as if this were CUDA: the attempt itself is what is tested."""
    seen = []

    def pretended(name, attempt, device, dtype):
        return Availability(name, attempt() is None, "pretended")

    def spied(kernel):
        def spy(module, query, key, value, **options):
            seen.extend([query, key])
            for tensor in (query, key, value):
                tensor.retain_grad()
            return kernel(module, query, key, value, **options)

        return spy

    build = KERNELS[name]
    monkeypatch.setattr("mmrl.attention.probe", pretended)
    monkeypatch.setitem(KERNELS, name, lambda layout: spied(build(layout)))
    heads = Heads.of(network("qwen3"))
    assert heads == (4, 2, 8)
    assert pick_attention(name, CPU, torch.float32, heads).works
    assert [tuple(tensor.shape) for tensor in seen] == [(1, 4, 5, 8), (1, 2, 5, 8)]
    assert all(tensor.grad.abs().max() > 0 for tensor in seen)


def test_every_sample_is_scored_through_the_kernel_of_the_backend(folders, monkeypatch):
    """A kernel that sees nothing but itself gives other scores, so it is the one that runs."""
    backend = make_backend(folders["qwen3"])
    batch = make_batch(backend, list(backend.rollout(make_requests(prompts=PROMPTS[:1]))))
    needs = frozenset({"logp"})
    before = backend.evaluate(batch, needs).logp

    def blind(layout):
        return lambda module, query, key, value, **options: value.repeat_interleave(
            2, dim=1
        ).transpose(1, 2)

    monkeypatch.setitem(KERNELS, "blind", blind)
    backend.attention = Availability("blind", True, "")
    assert not torch.allclose(backend.evaluate(batch, needs).logp, before, atol=1e-2)
