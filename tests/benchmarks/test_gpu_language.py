"""The GPU benchmark of language models at toy size on the CPU, and what it counts."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_language as benchmark
from benchmarks import gpu_language_models as models
from benchmarks.gpu_language import TUNING, UPDATES, Measured
from benchmarks.gpu_language_models import QWEN3_4B, QWEN25_VL_3B, SIZES, TOYS, Variant
from benchmarks.rates import count_flops
from mmrl.text.kernels import segments
from mmrl.text.layout import lay_out
from mmrl.weights import trainable

TINY = ["--tiny", "--device", "cpu", "--repeats", "1", "--groups", "2"]
CPU, META = torch.device("cpu"), torch.device("meta")
CASES = list(product(SIZES, TUNING))


@pytest.mark.slow
@pytest.mark.parametrize("model", SIZES)
def test_toy_run_measures_every_variant(model, tmp_path, capsys):
    arguments = ["--models", model, "--tuning", *TUNING, "--out", str(tmp_path)]
    assert benchmark.main([*TINY, *arguments]) == 0
    (found,) = tmp_path.glob("*-gpu-language.json")
    cases = json.loads(found.read_text())["cases"]
    assert [(case["model"], case["tuning"]) for case in cases] == [(model, t) for t in TUNING]
    for case in cases:
        variants = case["variants"]
        assert [(v["variant"]["update"], v["variant"]["checkpointing"]) for v in variants] == list(
            product(UPDATES, (False, True))
        )
        assert all(v["seconds"] > 0 and v["failed"] is None for v in variants)
        # The same weights and tokens in bf16, whose batches of other shapes are rounded otherwise.
        assert [v["logp"] for v in variants] == pytest.approx(
            [variants[0]["logp"]] * len(variants), abs=1e-2
        )
        assert case["rollout_tokens_per_second"] > 0
        assert case["update_tokens"] == 2 * (3 + 5 + 7 + 9)
    text = found.with_suffix(".md").read_text()
    assert "numbers mean nothing" in text
    assert text.count("update tokens/s") == len(TUNING)
    assert f"{model} | lora | shared_prompt, sdpa, no" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--device", "cpu"], [*TINY, "--attention", "spda"],
                                       [*TINY, "--attention", "flash"]])  # fmt: skip
def test_refusals_are_one_line(arguments, tmp_path, capsys):
    assert benchmark.main([*arguments, "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_refuses(capsys):
    assert benchmark.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_padded_rows_are_measured_with_sdpa_alone():
    found = benchmark.all_variants("lora", UPDATES, ["flash", "sdpa"])
    kernels = {update: {v.attention for v in found if v.update == update} for update in UPDATES}
    both = {"flash", "sdpa"}
    assert kernels == {"shared_prompt": both, "packed": both, "padded": {"sdpa"}}


# What is trained


@pytest.mark.parametrize(
    ("size", "parameters"), [(QWEN3_4B, 4_022_468_096), (QWEN25_VL_3B, 3_754_622_976)]
)
def test_networks_have_the_published_size(size, parameters):
    network = models.random_network(size, Variant(tuning="full"), META)
    assert sum(p.numel() for p in network.parameters()) == parameters
    adapted = models.random_network(size, Variant(), META)
    frozen = [p for p in adapted.parameters() if not p.requires_grad]
    assert sum(p.numel() for p in frozen) == parameters
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_prompts_and_completions_are_of_the_length_that_is_said(size):
    rows = models.random_rows(size, 2)
    assert len(rows) == 16
    assert {len(row.prompt.ids) for row in rows} == {400}
    assert sum(len(row.completion) for row in rows) == 16 * 512
    assert (len(rows[0].completion), len(rows[7].completion)) == (256, 768)
    assert len({id(row.prompt) for row in rows}) == 2
    assert not {models.IMAGE, models.VISION_START} & {i for row in rows for i in row.completion}
    images = rows[0].prompt.ids.count(models.IMAGE)
    assert images == (256 if size.patches else 0)
    assert rows[0].prompt.positions.shape == (3 if size.patches else 1, 400)


@pytest.mark.parametrize(("model", "tuning"), CASES)
def test_an_update_moves_what_is_trained_alone(model, tuning):
    size = TOYS[model]
    backend = models.build_backend(size, Variant(tuning=tuning, dtype="fp32"), CPU)
    trained = trainable(backend.model)
    before = {n: p.detach().clone() for n, p in backend.model.named_parameters()}
    batches = benchmark.update_batches(models.random_rows(size, 2), size.group, CPU)
    assert [len(batch.mask) for batch in batches] == [4, 4]
    benchmark.update(backend, torch.optim.SGD(trained.values(), lr=1.0), batches)
    moved = {n for n, p in backend.model.named_parameters() if not torch.equal(before[n], p.data)}
    assert moved
    assert moved <= trained.keys()
    assert not any("visual" in name for name in moved)
    assert all("lora_" in name for name in moved) == (tuning == "lora")


# What is counted


def layout_of(rows, variant):
    return lay_out(rows, share_prompts=variant.update == "shared_prompt")


def rectangles(rows, variant):
    """What the counter sees of attention: every token with all that one of its segment sees."""
    for own, seen in segments(layout_of(rows, variant)):
        yield (own.stop - own.start) * sum(s.stop - s.start for s in seen)


@pytest.mark.parametrize("update", ["shared_prompt", "packed"])
@pytest.mark.parametrize("tuning", TUNING)
def test_what_is_counted_is_what_is_done(tuning, update, monkeypatch):
    """But for causal masks, of which the counter knows nothing, and for the frozen head, inside of
    which it fails: here it is one that computes its logits again, as a trained one does.
    """
    monkeypatch.setattr("mmrl.text.head.is_frozen_linear", lambda head: False)
    size, variant = TOYS["qwen3-4b"], Variant(tuning=tuning, update=update, dtype="fp32")
    rows = models.random_rows(size, 1)
    backend = models.build_backend(size, variant, CPU)
    optimizer = torch.optim.SGD(trainable(backend.model).values(), lr=0.0)
    batches = benchmark.update_batches(rows, size.group, CPU)
    with sdpa_kernel(SDPBackend.MATH):
        done = count_flops(lambda: benchmark.update(backend, optimizer, batches))
    monkeypatch.setattr(benchmark, "pairs_of", rectangles)
    counted = benchmark.count_update(size, variant, rows)
    tokens, targets = layout_of(rows, variant).tokens.shape[1], 3 + 5 + 7 + 9
    counted += 2 * 32 * 64 * targets
    if tuning == "lora":
        # Nothing before the first block is trained, so its first products have no backward pass
        # for their inputs: queries, keys and values, and their adapters of rank 2.
        counted -= 2 * tokens * (32 * (32 + 16 + 16) + 3 * 2 * 32)
    assert done == pytest.approx(counted, rel=2e-3)  # the angles of rotary positions


def test_pairs_of_a_tree_by_hand():
    """A prompt of 5 sees 15; completions of 3, 5, 7, 9 see 5 of it each and 6, 15, 28, 45."""
    rows = models.random_rows(TOYS["qwen3-4b"], 1)
    own = 6 + 15 + 28 + 45 + 5 * (3 + 5 + 7 + 9)
    for update, prompts in (("shared_prompt", 1), ("packed", 4), ("padded", 4)):
        assert sum(benchmark.pairs_of(rows, Variant(update=update))) == own + prompts * 15


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_work_of_the_full_size_is_six_operations_a_weight_and_token_and_some(size):
    """For full fine-tuning of a packed row: 6 N T, where a tied head counts with the blocks."""
    rows = models.random_rows(size, 1)
    work = benchmark.count_update(size, Variant(tuning="full", update="packed"), rows)
    parameters = {"Qwen3-4B": 4.02e9, "Qwen2.5-VL-3B": 3.09e9}[size.name]
    tokens = 8 * (400 + 512)
    assert 0.9 < work / (6 * parameters * tokens) < 1.15


# The report


def test_shares_are_work_over_time_and_rate():
    found = Measured(variant=Variant(), work=300.0, seconds=2.0)
    assert benchmark._share(found, 1000.0) == "0.150"
    assert benchmark._share(found, None) == "-"
    assert benchmark._row(found, 50)[1] == "25"


def test_a_variant_that_does_not_fit_is_a_line(monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(benchmark, "measure_update", fail)
    arguments = ["--models", "qwen3-4b", "--updates", "padded", "--out", str(tmp_path)]
    assert benchmark.main([*TINY, *arguments]) == 0
    assert "padded, sdpa, no | out of memory | -" in capsys.readouterr().out
