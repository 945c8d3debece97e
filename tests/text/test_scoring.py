"""Scores of completions: three ways, one result; and against the network's own logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny_text import (
    ARCHITECTURES,
    make_backend,
    make_batch,
    make_config,
    make_requests,
    network,
)

from mmrl.text.attention import NAME, register
from mmrl.text.head import score
from mmrl.text.layout import Encoded, Row, lay_out
from mmrl.text.scoring import own_logp, score_rows
from mmrl.types import Tempering
from mmrl.weights import trainable

LONG, SHORT = Encoded.of_text((5, 6, 7)), Encoded.of_text((10,))
ROWS = (
    Row(prompt=LONG, completion=(8, 9)),
    Row(prompt=SHORT, completion=(11, 12, 13, 14)),
    Row(prompt=LONG, completion=(15,)),
    Row(prompt=LONG, completion=(8, 9, 10)),
)
WAYS = ("shared_prompt", "packed", "padded")


def load(name, **changes):
    register()
    model = network(name, **changes)
    model.set_attn_implementation(NAME)
    return model


def scores(model, how, rows=ROWS, chunk=3, temperature=1.0, with_entropy=True):
    return score_rows(
        model, rows, 4, how=how, temperature=temperature, chunk=chunk, with_entropy=with_entropy
    )


def gradient(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_the_networks_own_logits(name, how):
    model = load(name)
    found = scores(model, how).logp
    for i, row in enumerate(ROWS):
        length = len(row.completion)
        torch.testing.assert_close(found[i, :length], own_logp(model, row), rtol=1e-5, atol=1e-5)
        assert bool((found[i, length:] == 0).all())


@pytest.mark.parametrize("how", ["shared_prompt", "packed"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_the_padded_form(name, how):
    weights = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    found = []
    for way in (how, "padded"):
        model = load(name)
        terms = scores(model, way)
        found.append(gradient(model, (weights * (terms.logp + 0.3 * terms.entropy)).sum()))
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


def test_a_prompt_is_computed_once_for_all_its_completions():
    shared, apart = (lay_out(ROWS, share_prompts=share) for share in (True, False))
    assert shared.tokens.shape == (1, 3 + 2 + 1 + 3 + 1 + 4)
    assert apart.tokens.shape == (1, sum(len(r.prompt.ids) + len(r.completion) for r in ROWS))
    assert len(shared.trees) == 2
    assert len(apart.trees) == 4


@pytest.mark.parametrize("share", [True, False])
def test_a_layout_knows_whose_each_token_is(share):
    layout = lay_out(ROWS, share_prompts=share)
    values = layout.unpack(layout.targets, (4, 4))
    for i, row in enumerate(ROWS):
        assert values[i].tolist() == [*row.completion, *[0] * (4 - len(row.completion))]
    before = layout.unpack(layout.tokens[0, layout.before], (4, 4))
    for i, row in enumerate(ROWS):
        assert before[i, : len(row.completion)].tolist() == [
            row.prompt.ids[-1],
            *row.completion[:-1],
        ]
    places = layout.unpack(layout.positions[0, 0, layout.before], (4, 4))
    for i, row in enumerate(ROWS):
        expected = range(len(row.prompt.ids) - 1, len(row.prompt.ids) + len(row.completion) - 1)
        assert places[i, : len(row.completion)].tolist() == list(expected)


def test_another_completion_of_the_prompt_changes_nothing():
    model = load("qwen3")
    alone = scores(model, "shared_prompt", ROWS[:1]).logp
    other = Row(prompt=ROWS[0].prompt, completion=(20, 21, 22, 23))
    together = scores(model, "shared_prompt", (other, ROWS[0])).logp
    torch.testing.assert_close(together[1], alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 1000])
def test_the_chunk_changes_nothing(chunk):
    found = []
    for size in (chunk, 3):
        model = load("llama")
        terms = scores(model, "packed", chunk=size)
        found.append((terms.logp, gradient(model, terms.logp.sum())))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-6, atol=1e-6)
    assert (found[0][1] - found[1][1]).norm() < 1e-6 * found[1][1].norm()


def test_the_logits_of_a_chunk_have_a_limit(folders):
    path = folders["qwen3"]
    given = [make_config(path).chunk(size) for size in (512, 32768, 151936, 10**9)]
    assert given == [1024, 1024, 2**25 // 151936, 1]
    assert make_config(path, head_chunk=7).chunk(10**9) == 7


def test_log_probabilities_and_entropy_by_a_float64_loop():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 4, generator=generator), torch.randn(7, 4, generator=generator)
    targets = torch.tensor([0, 6, 3, 3, 1])
    found = score(
        lambda h: h @ weight.T, hidden, targets, temperature=0.6, chunk=2, with_entropy=True
    )
    for m in range(5):
        logits = [float((hidden[m] * weight[v]).sum().double()) / 0.6 for v in range(7)]
        total = sum(torch.tensor(x, dtype=torch.float64).exp() for x in logits).log()
        logp = [x - float(total) for x in logits]
        assert float(found.logp[m]) == pytest.approx(logp[int(targets[m])], abs=1e-5)
        entropy = -sum(float(torch.tensor(x).exp()) * x for x in logp)
        assert float(found.entropy[m]) == pytest.approx(entropy, abs=1e-5)


@pytest.mark.parametrize("second", [1.2, 0.8, 1.0])
@pytest.mark.parametrize("form", ["frozen", "function", "no_grad"])
def test_other_numbers_of_a_distribution_by_a_float64_loop(form, second):
    """From the logits that are there anyway: the head is asked once for each chunk."""
    head, targets = frozen_head(bias=True), torch.tensor([0, 6, 3, 3, 1])
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    calls = []
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.set_grad_enabled(form != "no_grad"):
        found = score(
            (lambda h: head(h)) if form == "function" else head,
            hidden.clone().requires_grad_(),
            targets,
            temperature=0.6,
            chunk=2,
            with_entropy=True,
            entropy_slope=False,
            second_temperature=second,
            with_sum_squares=True,
        )
    assert len(calls) == 3
    for m in range(5):
        logits = [float(x) for x in head(hidden)[m].detach() / 0.6]
        p, q = ([math.exp(x / t) for x in logits] for t in (1.0, second))
        p, q = ([x / sum(row) for x in row] for row in (p, q))
        target = int(targets[m])
        assert found.logp[m].item() == pytest.approx(math.log(p[target]), abs=1e-5)
        assert float(found.tempered[m]) == pytest.approx(math.log(q[target]), abs=1e-5)
        assert float(found.sum_squares[m]) == pytest.approx(sum(x * x for x in p), abs=1e-6)
        assert float(found.entropy[m]) == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-5)
    assert found.logp.requires_grad == (form != "no_grad")
    assert not any(x.requires_grad for x in (found.tempered, found.sum_squares, found.entropy))


@pytest.mark.parametrize("slope", [True, False])
def test_what_else_is_asked_for_changes_no_bit_of_the_rest(slope):
    head, targets = frozen_head(50, 16, torch.float32), torch.arange(0, 50, 3)
    states = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(2))
    found = []
    for more in ({}, {"second_temperature": 1.2, "with_sum_squares": True}):
        leaf = states.clone().requires_grad_()
        options = {"temperature": 0.8, "chunk": 4, "with_entropy": True, "entropy_slope": slope}
        scored = score(head, leaf, targets, **options, **more)
        (scored.logp.sum() + (scored.entropy.sum() if slope else 0.0)).backward()
        found.append((scored.logp.detach(), scored.entropy.detach(), leaf.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_backend_gives_what_is_needed_and_nothing_else(folders):
    backend = make_backend(folders["qwen3"])
    batch = make_batch(backend, list(backend.rollout(make_requests())))
    scale = torch.ones(len(batch.mask), dtype=torch.float64)
    batch = replace(batch, tempering=Tempering(scale=scale, temperature=1.2))
    plain = backend.evaluate(batch, frozenset({"logp"}))
    assert plain.logp_tempered is None
    assert plain.sum_squares is None
    needs = frozenset({"logp", "logp_tempered", "sum_squares"})
    terms = backend.evaluate(batch, needs)
    assert torch.equal(terms.logp, plain.logp)
    hotter = make_backend(folders["qwen3"], {"temperature": 1.2})
    expected = hotter.evaluate(batch, frozenset({"logp"})).logp.detach()
    torch.testing.assert_close(terms.logp_tempered, expected, rtol=1e-5, atol=1e-5)
    assert bool((terms.sum_squares >= terms.logp.detach().exp().square())[batch.mask].all())
    # Of the policy that sampled, when the present one has moved on.
    anchors = backend.anchor(batch, needs)
    for parameter in trainable(backend.model).values():
        parameter.data.add_(0.05)
    later = backend.evaluate(replace(batch, memory=[a.memory for a in anchors]), needs)
    assert torch.equal(later.logp_tempered, terms.logp_tempered)
    assert bool((later.logp != terms.logp)[batch.mask].any())


def frozen_head(vocabulary=7, width=4, dtype=torch.float64, bias=False):
    head = torch.nn.Linear(width, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(1))
    return head


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_slope_of_a_frozen_head_is_that_of_differences(temperature, bias):
    head, targets = frozen_head(bias=bias), torch.tensor([0, 6, 3, 3, 1])
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(states):
        # The scores are float32, so the weights make a difference of 1e-3 visible.
        found = score(head, states, targets, temperature=temperature, chunk=2, with_entropy=False)
        return (found.logp.double() * torch.arange(1.0, 6.0)).sum()

    states = hidden.clone().requires_grad_()
    loss(states).backward()
    for i in range(5):
        for d in range(4):
            step = torch.zeros_like(hidden)
            step[i, d] = 1e-2
            expected = (loss(hidden + step) - loss(hidden - step)) / 2e-2
            assert float(states.grad[i, d]) == pytest.approx(float(expected), abs=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_scores_as_any_other(dtype):
    head, targets = frozen_head(50, 16, dtype), torch.arange(0, 50, 3)
    states = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = torch.randn(len(targets), generator=torch.Generator().manual_seed(3))
    found = []
    for form in (head, lambda hidden: head(hidden)):
        leaf = states.clone().requires_grad_()
        logp = score(form, leaf, targets, temperature=0.8, chunk=4, with_entropy=False).logp
        (weights * logp).sum().backward()
        found.append((logp.detach(), leaf.grad.float()))
    assert torch.equal(found[0][0], found[1][0])
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert (found[0][1] - found[1][1]).norm() < bound * found[1][1].norm()


@pytest.mark.parametrize("frozen", [True, False])
def test_an_entropy_without_a_slope_is_the_same_number(frozen):
    head, targets = frozen_head(50, 16, torch.float32), torch.arange(0, 50, 3)
    form = head if frozen else lambda hidden: head(hidden)
    states = torch.randn(len(targets), 16, generator=torch.Generator().manual_seed(2))
    found = []
    for slope in (True, False):
        leaf = states.clone().requires_grad_()
        options = {"temperature": 0.8, "chunk": 4, "with_entropy": True, "entropy_slope": slope}
        logp, entropy, *_ = score(form, leaf, targets, **options)
        assert entropy.requires_grad == slope
        logp.sum().backward()
        found.append((logp.detach(), entropy.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_entropy_is_logged_whoever_asks(folders):
    backend = make_backend(folders["qwen3"], needs=("logp", "entropy"))
    batch = make_batch(backend, list(backend.rollout(make_requests())))
    plain = backend.evaluate(batch, frozenset({"logp"}))
    asked = backend.evaluate(batch, frozenset({"logp", "entropy"}))
    assert plain.entropy is None
    total, count = plain.metrics["entropy"]
    assert count == float(batch.mask.sum())
    assert total == pytest.approx(asked.entropy[batch.mask].sum().item(), rel=1e-5)


def test_a_window_that_is_too_short_is_refused():
    model = load(
        "qwen2",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    with pytest.raises(ValueError, match="sliding_window = 4 for 6 tokens"):
        scores(model, "packed")


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_checkpointing_recomputes_every_block_and_changes_nothing_else(folders, lora):
    found = []
    for recomputed in (False, True):
        model = {"lora": lora, "gradient_checkpointing": recomputed}
        backend = make_backend(folders["qwen3"], model=model)
        groups = list(backend.rollout(make_requests()))
        calls = []
        for block in backend._network.base_model.layers:
            block.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        logp = backend.evaluate(make_batch(backend, groups), frozenset({"logp"})).logp
        logp.sum().backward()
        assert len(calls) == (4 if recomputed else 2)
        grads = torch.cat([p.grad.flatten() for p in trainable(backend.model).values()])
        found.append(([group.payload.samples for group in groups], logp.detach(), grads))
    assert found[0][0] == found[1][0]
    for plain, recomputed in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("how", WAYS)
def test_a_replay_is_bit_equal_and_the_reference_is_the_loaded_model(folders, how):
    backend = make_backend(folders["qwen3"], needs=("logp", "logp_ref"), update=how)
    batch = make_batch(backend, list(backend.rollout(make_requests())))
    needs = frozenset({"logp", "logp_ref"})
    first, second = (backend.evaluate(batch, needs) for _ in range(2))
    assert torch.equal(first.logp, second.logp)
    assert torch.equal(first.logp, first.logp_ref)
    for parameter in trainable(backend.model).values():
        parameter.data.add_(0.05)
    moved = backend.evaluate(batch, needs)
    assert torch.equal(moved.logp_ref, first.logp_ref)
    assert bool((moved.logp != first.logp)[batch.mask].any())


def test_the_reference_of_full_fine_tuning_survives_a_checkpoint(folders):
    needs = frozenset({"logp", "logp_ref"})
    backend = make_backend(folders["qwen3"], needs=needs, model={"lora": None})
    batch = make_batch(backend, list(backend.rollout(make_requests())))
    expected = backend.evaluate(batch, needs).logp_ref
    state = backend.auxiliary_state()
    for parameter in trainable(backend.model).values():
        parameter.data.add_(0.05)
    other = make_backend(folders["qwen3"], needs=needs, model={"lora": None})
    for mine, theirs in zip(
        trainable(other.model).values(), trainable(backend.model).values(), strict=True
    ):
        mine.data.copy_(theirs)
    other.load_auxiliary_state(state)
    found = other.evaluate(batch, needs)
    assert torch.equal(found.logp_ref, expected)
    assert bool((found.logp != expected)[batch.mask].any())
