"""Sampling: which distribution tokens come from, and what ends a completion."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_text import (
    ARCHITECTURES,
    PROMPTS,
    make_backend,
    make_batch,
    make_requests,
    network,
)
from transformers import TopKLogitsWarper, TopPLogitsWarper

from mmrl.text.generation import Completion, Settings, choose, generate, statistics
from mmrl.text.layout import Encoded
from mmrl.types import Greatest, Least, Total

PROMPT_IDS = [[5, 6, 7, 8], [9], [10, 11, 12]]
ENCODED = [Encoded.of_text(ids) for ids in PROMPT_IDS]
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5, 3.0]])


def chosen(settings, count=20000):
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return choose(LOGITS.expand(count, -1), uniforms, settings)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, 1.0), (3, 1.0), (None, 0.8), (4, 0.7)])
def test_tokens_come_from_the_distribution_that_transformers_would_use(temperature, top_k, top_p):
    logits = LOGITS / temperature
    if top_k is not None:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1.0:
        logits = TopPLogitsWarper(top_p)(None, logits)
    expected = logits.softmax(-1)[0]
    tokens, logp = chosen(Settings(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p))
    shares = torch.bincount(tokens, minlength=6) / len(tokens)
    # Five deviations of a share of 20,000 draws at its widest.
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.018)
    assert bool((shares[expected == 0] == 0).all())
    torch.testing.assert_close(logp, expected[tokens].log())


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_no_number_chooses_a_token_that_cannot_come(uniform, top_k):
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, -2.0, -torch.inf]])
    settings = Settings(max_tokens=1, top_k=top_k, forbidden=(1,))
    token, logp = choose(logits, torch.tensor([uniform]), settings)
    allowed = {2, 3} if top_k != 1 else {2}
    assert int(token) in allowed
    assert bool(torch.isfinite(logp).all())


def test_temperature_0_takes_the_likeliest():
    token, logp = choose(LOGITS, torch.tensor([0.1]), Settings(max_tokens=1, temperature=0))
    assert int(token) == 5
    assert float(logp) == 0.0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_completions_are_those_of_transformers(name):
    model = network(name)
    settings = Settings(max_tokens=8, temperature=0, ends=frozenset({2}))
    found = generate(model, ENCODED, [0, 1, 2], torch.zeros(3, 8), settings)
    for prompt, completion in zip(PROMPT_IDS, found, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=2
        )
        assert completion.ids == expected[0, len(prompt) :].tolist()


def test_recorded_log_probabilities_are_those_of_whole_texts():
    model = network("qwen3")
    uniforms = torch.rand(6, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = Settings(max_tokens=10, temperature=0.7, ends=frozenset({2}))
    owners = [0, 0, 1, 1, 2, 2]
    for owner, sample in zip(
        owners, generate(model, ENCODED, owners, uniforms, settings), strict=True
    ):
        prompt = PROMPT_IDS[owner]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)[range(len(sample.ids)), sample.ids]
        torch.testing.assert_close(torch.tensor(sample.logp), expected, rtol=1e-5, atol=1e-5)


def test_a_sample_does_not_depend_on_what_is_in_the_batch():
    model = network("qwen3")
    uniforms = torch.rand(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    settings = Settings(max_tokens=12, ends=frozenset({2, 3, 4, 5, 6}))
    owners = [2, 0, 1, 0, 2]
    together = generate(model, ENCODED, owners, uniforms, settings)
    assert len({len(sample.ids) for sample in together}) > 1, "some leave the batch early"
    for i, owner in enumerate(owners):
        (alone,) = generate(model, [ENCODED[owner]], [0], uniforms[i : i + 1], settings)
        assert alone.ids == together[i].ids
        assert alone.finished == together[i].finished


def watched(model):
    """The list to which every later forward of ``model`` adds its tokens [n][t]."""
    calls = []
    model.register_forward_pre_hook(
        lambda _, args, given: calls.append(given["input_ids"].tolist()), with_kwargs=True
    )
    return calls


def test_a_prompt_is_read_once_and_finished_samples_leave_the_batch():
    model = network("qwen3")
    calls = watched(model)
    uniforms = torch.rand(5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    settings = Settings(max_tokens=12, ends=frozenset({2, 3, 4, 5, 6}))
    samples = [s.ids for s in generate(model, ENCODED, [2, 0, 1, 0, 2], uniforms, settings)]
    read, *grown = calls
    assert read == [[5, 6, 7, 8], [0, 0, 0, 9], [0, 10, 11, 12]], "padded on the left"
    longest = max(map(len, samples))
    # Of a sample's last token nothing is asked.
    assert grown == [[[ids[k]] for ids in samples if len(ids) > k + 1] for k in range(longest - 1)]
    assert len({len(rows) for rows in grown}) > 2, "else none leaves while others go on"


@pytest.mark.parametrize("size", [4, 5, 64])
def test_a_group_is_read_once_however_groups_are_put_together(folders, size):
    backend = make_backend(folders["qwen3"], {"batch_size": size})
    calls = watched(backend._network)
    groups = list(backend.rollout(make_requests(group_size=4)))
    assert [len(group.outputs) for group in groups] == [4, 4, 4]
    assert sum(len(rows) for rows in calls if len(rows[0]) > 1) == len(PROMPTS)


def test_an_end_token_belongs_to_the_completion_and_nothing_follows():
    model = network("qwen3")
    everything = frozenset(range(3, 40))
    (sample,) = generate(
        model,
        [Encoded.of_text([5])],
        [0],
        torch.full((1, 4), 0.5),
        Settings(max_tokens=4, ends=everything),
    )
    assert len(sample.ids) == len(sample.logp) == 1
    assert sample.finished


def test_the_limit_leaves_a_completion_unfinished():
    model = network("qwen3")
    (sample,) = generate(
        model, [Encoded.of_text([5])], [0], torch.full((1, 3), 0.5), Settings(max_tokens=3)
    )
    assert len(sample.ids) == 3
    assert not sample.finished


def test_stop_texts_end_a_completion_and_stay_in_it(folders):
    free = make_backend(folders["qwen3"], {"max_tokens": 12})
    group = next(free.rollout(make_requests()))
    word = group.outputs[0].split()[2]
    stopping = make_backend(folders["qwen3"], {"max_tokens": 12, "stop": [word]})
    found = next(stopping.rollout(make_requests()))
    for before, after in zip(group.outputs, found.outputs, strict=True):
        words = before.split()
        cut = words.index(word) + 1 if word in words else len(words)
        assert after.split() == words[:cut]
    assert found.outputs[0].split()[-1] == word


def test_samples_do_not_depend_on_the_batch_size(folders):
    found = [
        [
            g.outputs
            for g in make_backend(folders["qwen3"], {"batch_size": b}).rollout(make_requests())
        ]
        for b in (1, 8, 64)
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("size", [1, 3, 64])
def test_groups_of_unlike_sizes_hold_the_samples_of_equal_ones(folders, size):
    """A group may also be larger than a batch."""
    backend = make_backend(folders["qwen3"], {"batch_size": size})
    equal = list(backend.rollout(make_requests(group_size=7)))
    sizes = (7, 1, 4)
    requests = [replace(r, group_size=n) for r, n in zip(make_requests(), sizes, strict=True)]
    ragged = list(backend.rollout(requests))
    for request, group, whole in zip(requests, ragged, equal, strict=True):
        assert group.request == request
        assert list(group.outputs) == list(whole.outputs[: request.group_size])
    together = backend.evaluate(make_batch(backend, ragged), frozenset({"logp"})).logp
    rows = (backend.evaluate(make_batch(backend, [g]), frozenset({"logp"})).logp for g in ragged)
    alone = [row for logp in rows for row in logp]
    for row, other in zip(together, alone, strict=True):
        torch.testing.assert_close(row[: len(other)], other, rtol=1e-5, atol=1e-5)


def test_a_process_without_a_further_batch_keeps_step(folders, monkeypatch):
    """As where ZeRO 3 splits the weights and another process has two batches more."""
    backend = make_backend(folders["qwen3"], {"batch_size": 4})
    expected = [g.outputs for g in backend.rollout(make_requests())]
    answers = iter([True] * 5 + [False])
    monkeypatch.setattr(
        "mmrl.text.backend.any_goes_on", lambda network: lambda more: next(answers) or more
    )
    asked, complete = [], backend._complete
    monkeypatch.setattr(backend, "_complete", lambda *a: asked.append(a[0]) or complete(*a))
    assert [g.outputs for g in backend.rollout(make_requests())] == expected
    assert len(asked) == 5
    assert asked[2] == asked[3] == asked[4]


def test_seed_step_and_prompt_choose_the_samples(folders):
    backend = make_backend(folders["qwen3"], {"max_tokens": 12})

    def outputs(**changes):
        return [g.outputs for g in backend.rollout(make_requests(**changes))]

    assert outputs() == outputs()
    assert outputs() != outputs(seed=8)
    assert outputs()[1:] == outputs(prompts=PROMPTS[1:])
    assert len(set(outputs()[0])) > 1, "samples of a group differ"


def test_evaluation_has_its_own_settings(folders):
    backend = make_backend(folders["qwen3"], evaluation={"temperature": 0.0, "max_tokens": 3})
    groups = list(backend.rollout(make_requests(), evaluation=True))
    assert all(len(set(group.outputs)) == 1 for group in groups)
    assert all(group.mask.shape[1] <= 3 for group in groups)


def test_lengths_are_reported_under_trls_keys():
    samples = [
        Completion(ids=[5] * length, finished=finished)
        for length, finished in ((2, True), (6, False), (5, True), (6, False))
    ]
    found = statistics(samples, prompt_tokens=10)
    assert found == {
        "completions/clipped_ratio": (2, 4),
        "completions/mean_length": (19, 4),
        "completions/min_length": 2,
        "completions/max_length": 6,
        "completions/mean_terminated_length": (7, 2),
        "completions/min_terminated_length": 2,
        "completions/max_terminated_length": 5,
        "num_tokens": 4 * 10 + 19,
    }
    kinds = {name.split("/")[-1].split("_")[0]: type(value) for name, value in found.items()}
    assert kinds == {"clipped": tuple, "mean": tuple, "min": Least, "max": Greatest, "num": Total}
    assert "completions/mean_terminated_length" not in statistics(samples[1:2], 10)
