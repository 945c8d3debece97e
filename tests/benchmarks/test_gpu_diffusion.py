"""The GPU benchmark at toy size on the CPU, and what it counts."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gpu_diffusion, gpu_models
from benchmarks.gpu_diffusion import Measured, Work, update_images
from benchmarks.gpu_models import FLUX, METHODS, SD35, SIZES, TOYS, Variant
from benchmarks.rates import count_flops, matmul_rate
from mmrl.preflight import refuse_unless_consistent
from mmrl.weights import trainable

TINY = ["--tiny", "--device", "cpu", "--repeats", "1"]
CPU = torch.device("cpu")
FP32 = Variant(dtype="fp32")
CASES = list(product(SIZES, METHODS))


class Made:
    """A toy backend with its rollouts and the micro-batches of an update."""

    def __init__(self, model, method, variant=FP32, micro_batch=None):
        self.size = TOYS[model]
        self.run = gpu_models.load_recipe(self.size, method, variant, micro_batch=micro_batch)
        self.drawn = gpu_diffusion.rollout_images(self.run)
        self.trained = update_images(self.run)
        self.backend = gpu_models.build_backend(self.run, self.size, variant, CPU, self.drawn)
        self.requests = gpu_models.requests_for(self.run, self.drawn, 0)
        self.groups = list(self.backend.rollout(self.requests))

    def batches(self, images=None):
        return gpu_diffusion.update_batches(
            self.run, self.backend, self.groups, images or self.trained, CPU
        )

    def update(self, images=None, rate=0.1):
        optimizer = torch.optim.SGD(trainable(self.backend.model).values(), lr=rate)
        return gpu_diffusion.update(self.run, self.backend, optimizer, self.batches(images))


# The compiler looks at .grad of tensors inside the graph, and its own warning would end it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("model", "methods", "backend"),
    [
        ("sd35", METHODS, "none"),
        pytest.param("flux", METHODS, "none", marks=pytest.mark.slow),
        pytest.param("sd35", ["awm"], "eager", marks=pytest.mark.slow),
        pytest.param("flux", ["opd"], "eager", marks=pytest.mark.slow),
    ],
)
def test_toy_run_measures_every_variant(model, methods, backend, tmp_path, capsys):
    arguments = ["--models", model, "--methods", *methods, "--compile-backend", backend]
    assert gpu_diffusion.main([*TINY, *arguments, "--out", str(tmp_path)]) == 0
    (found,) = tmp_path.glob("*-gpu-diffusion.json")
    cases = json.loads(found.read_text())["cases"]
    assert [(case["model"], case["method"]) for case in cases] == [(model, m) for m in methods]
    for case in cases:
        variants = case["variants"]
        assert len(variants) == (2 if backend == "none" else 4)
        assert all(v["rollout"] > 0 and v["update"] > 0 for v in variants)
        assert {v["variant"]["checkpointing"] for v in variants} == {True, False}
        # The same weights, prompts and noise: recomputing and compiling change no velocity.
        assert [v["norm"] for v in variants] == pytest.approx([variants[0]["norm"]] * len(variants))
        assert case["per_image"]["update"] > case["per_image"]["rollout"] > 0
    text = found.with_suffix(".md").read_text()
    assert "numbers mean nothing" in text
    assert text.count("rollout s/image") == len(methods)
    assert f"{model} | {methods[0]} | sdpa" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--device", "cpu"], [*TINY, "--attention", "spda"],
                                       [*TINY, "--attention", "flash"]])  # fmt: skip
def test_refusals_are_one_line(arguments, tmp_path, capsys):
    assert gpu_diffusion.main([*arguments, "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_refuses(capsys):
    assert gpu_diffusion.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


# What is trained


@pytest.mark.parametrize(
    ("size", "parameters"), [(SD35, 2_243_171_520), (FLUX, 11_901_408_320)], ids=["sd35", "flux"]
)
def test_networks_have_the_published_size(size, parameters):
    network = gpu_models.random_transformer(size, torch.bfloat16, torch.device("meta"))
    # That of the released transformer; SD3's table of positions is a buffer.
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    family = size.family(network, torch.device("meta"))
    assert family.latent_shape(size.pixels, size.pixels) == (16, 64, 64)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("model", "method"), CASES)
def test_recipes_are_those_of_the_method(model, method):
    run = gpu_models.load_recipe(SIZES[model], method, Variant())
    refuse_unless_consistent(run)
    config = run.backend.config
    assert config.model.family == SIZES[model].module
    likelihood, objective = {
        "awm": ("flow_matching", "grpo"),
        "flow-grpo": ("transition", "grpo"),
        "opd": ("transition", "opd"),
    }[method]
    assert (config.likelihood.name, run.objective.name) == (likelihood, objective)
    assert len(config.teachers) == (3 if method == "opd" else 0)
    assert gpu_diffusion.is_anchored(run) == (method == "flow-grpo")
    tokens = gpu_models.tokens_of(SIZES[model], config)
    expected = {"sd35": {"awm": 333}, "flux": {"awm": 512, "flow-grpo": 128, "opd": 128}}[model]
    assert tokens == expected.get(method, 205)


@pytest.mark.parametrize(("model", "method"), CASES)
def test_an_update_moves_the_adapter_alone(model, method):
    made = Made(model, method)
    trained = trainable(made.backend.model)
    before = {n: p.detach().clone() for n, p in made.backend.model.named_parameters()}
    assert made.update(rate=1.0) > 0
    moved = {
        n for n, p in made.backend.model.named_parameters() if not torch.equal(before[n], p.data)
    }
    assert moved
    assert moved <= trained.keys()
    assert all("lora_" in name and "teacher" not in name for name in trained)


@pytest.mark.parametrize(("model", "method"), CASES)
def test_every_decision_of_every_image_is_trained_once(model, method):
    """Whatever the micro-batch: the same gradient, hence the same weights after plain descent."""
    found = []
    for micro_batch in (1, 4, 100):
        made = Made(model, method, micro_batch=micro_batch)
        seen = sum(int(batch.mask.sum()) for batch in made.batches(3))
        assert seen == 3 * made.backend.config.num_decisions
        start = torch.cat([p.detach().flatten() for p in trainable(made.backend.model).values()])
        # Signs of advantages alternate in a micro-batch, so here all are the same.
        batches = [
            replace(batch, advantages=torch.ones_like(batch.advantages))
            for batch in made.batches(3)
        ]
        optimizer = torch.optim.SGD(trainable(made.backend.model).values(), lr=1.0)
        gpu_diffusion.update(made.run, made.backend, optimizer, batches)
        end = torch.cat([p.detach().flatten() for p in trainable(made.backend.model).values()])
        found.append(end - start)
    assert found[0].abs().max() > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-3 * found[0].abs().max())


def test_micro_batches_are_those_of_the_recipe():
    run = gpu_models.load_recipe(SD35, "awm", Variant())
    assert (gpu_diffusion.rollout_images(run), update_images(run)) == (6, 3)
    run = gpu_models.load_recipe(SD35, "awm", Variant(), 8, 36)
    assert (gpu_diffusion.rollout_images(run), update_images(run)) == (8, 6)
    assert update_images(gpu_models.load_recipe(SD35, "flow-grpo", Variant())) == 1
    # One for each teacher.
    run = gpu_models.load_recipe(SD35, "opd", Variant(), 1)
    assert (gpu_diffusion.rollout_images(run), update_images(run)) == (3, 3)


def test_anchors_are_what_the_update_would_find_without_one():
    made = Made("sd35", "flow-grpo", Variant())
    needs = frozenset({"logp"})
    for batch in made.batches():
        anchored = gpu_diffusion.anchored(made.backend, batch, needs)
        assert torch.equal(anchored.logp_old, made.backend.evaluate(batch, needs).logp.detach())


@pytest.mark.parametrize("scale", [0.0, 0.02])
def test_teachers_are_other_policies_by_their_random_adapters(scale, monkeypatch):
    """All of FLUX's have the student's guidance, so without them they are the student."""
    monkeypatch.setattr(gpu_models, "TEACHER_SCALE", scale)
    made = Made("flux", "opd")
    needs = frozenset({"mean_gap_teacher"})
    assert [r.prompt.task for r in made.requests] == ["geneval", "ocr", "pickscore"]
    gaps = torch.cat([made.backend.evaluate(b, needs).mean_gap_teacher for b in made.batches()])
    assert bool((gaps > 0).all()) == (scale > 0)
    assert bool((gaps == 0).all()) == (scale == 0)


# What is counted


def counted(size, method, **fewer_blocks):
    """At full width, which takes a tenth of the time with a tenth of the blocks."""
    return gpu_diffusion.count_work(replace(size, network=size.network | fewer_blocks), method)


def test_counted_work_of_sd35_agrees_with_a_hand_count():
    # Products of a block, as multiples of width^2: 12 for each token of either stream, 4 more for
    # image tokens of the dual blocks; attention 2 width for each pair of tokens.
    width, image, text, layers, dual = 1536, 1024, 333, 4, 2
    dense = layers * 12 * (image + text) * width**2 + dual * 4 * image * width**2
    pairs = layers * (image + text) ** 2 + dual * image**2
    forward = 2 * (dense + 2 * width * pairs)
    work = counted(SD35, "awm", num_layers=layers, dual_attention_layers=(0, 1))
    # The text's side of the last block ends after attention: 9 products of each token less.
    forward -= 2 * 9 * text * width**2
    # Adapters of rank 32 add about 1 %, embeddings and modulation less.
    assert work.rollout / 14 == pytest.approx(forward, rel=0.03)
    # 6 noise levels, each: policy, reference and average forward; backward through the inputs
    # of frozen products costs another forward, and a second one for attention alone.
    assert 6 * 3.9 * forward < work.update < 6 * 4.5 * forward


def test_counted_work_of_flux_agrees_with_a_hand_count():
    # Blocks with one stream have as many products for a token as those with two.
    width, tokens, double, single = 3072, 1024 + 128, 1, 2
    forward = 2 * (double + single) * (12 * tokens * width**2 + 2 * width * tokens**2)
    work = counted(FLUX, "flow-grpo", num_layers=double, num_single_layers=single)
    assert work.rollout / 6 == pytest.approx(forward, rel=0.03)
    # 5 steps, each: the anchor's forward, the policy's and its backward.
    assert 5 * 2.9 * forward < work.update < 5 * 3.5 * forward


@pytest.mark.parametrize(
    ("model", "method", "rollout", "update"),
    [
        ("sd35", "awm", 14 * 10, 6 * (25 + 9 + 10)),
        # Guidance asks twice; anchor, policy and, for the penalty, reference.
        ("sd35", "flow-grpo", 10 * 20, 9 * 2 * (10 + 25 + 9)),
        # Two of three teachers are guided.
        ("sd35", "opd", 10 * 20, 9 * 2 * 25 + 9 * 10 * (1 + 2 + 2) / 3),
        # Here guidance is an input.
        ("flux", "awm", 10 * 10, 4 * (25 + 10)),
        ("flux", "flow-grpo", 6 * 10, 5 * (10 + 25)),
        ("flux", "opd", 6 * 10, 5 * (25 + 10)),
    ],
)
def test_what_an_image_asks_for(model, method, rollout, update, monkeypatch):
    """In forwards of 10 with the adapter, 9 without it and 25 with a backward."""
    monkeypatch.setattr(gpu_diffusion, "count_row", lambda size, config: (10, 9, 25))
    work = gpu_diffusion.count_work(SIZES[model], method)
    assert (work.rollout, work.update) == (rollout, pytest.approx(update))


@pytest.mark.parametrize(("model", "method"), CASES)
def test_what_is_counted_is_what_is_done(model, method):
    work, made = gpu_diffusion.count_work(TOYS[model], method), Made(model, method)
    # The counter does not see into the CPU's own kernel.
    with sdpa_kernel(SDPBackend.MATH):
        drawn = count_flops(lambda: list(made.backend.rollout(made.requests)))
        trained = count_flops(made.update)
    assert drawn == made.drawn * work.rollout
    assert trained == pytest.approx(made.trained * work.update, rel=1e-9)


# The report


def test_shares_are_work_over_time_and_rate():
    measured, work = (
        Measured(variant=FP32, rollout=2.0, update=4.0),
        Work(rollout=100, update=300, decisions=6),
    )
    assert gpu_diffusion._shares(measured, work, 1000.0) == ["0.050", "0.075"]
    assert gpu_diffusion._shares(measured, work, None) == ["-", "-"]
    assert gpu_diffusion._row(measured, work)[3] == "1.5"


def test_a_variant_that_does_not_fit_is_a_line(monkeypatch):
    def fail(*arguments):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(gpu_diffusion, "measure", fail)
    found = gpu_diffusion.try_variant(SimpleNamespace(), FP32, TOYS["flux"], CPU, 1)
    row = gpu_diffusion._row(found, Work(rollout=1, update=1, decisions=1))
    assert row == ["sdpa, no, no", "out of memory", *"----"]


def test_peak_rates_are_found_by_name():
    assert gpu_diffusion.peak_rate("NVIDIA H200") == 989e12
    assert gpu_diffusion.peak_rate("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu_diffusion.peak_rate("NVIDIA H100 PCIe") is None
    assert gpu_diffusion.peak_rate(None) is None


def test_counts_the_textbook_number_of_operations():
    left, right = torch.ones(3, 5), torch.ones(5, 7)
    assert count_flops(lambda: left @ right) == 2 * 3 * 5 * 7


def test_matmul_rate_is_positive_and_finite():
    rate = matmul_rate((32, 32, 32), torch.float32, torch.device("cpu"), min_seconds=0.01)
    assert 0 < rate < 1e18
