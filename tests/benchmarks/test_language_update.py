"""The update benchmark compares equal work, refuses unequal work and sees memory that is used."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from benchmarks import language_peers as peers
from benchmarks import language_toys as toys
from benchmarks import language_update as benchmark

SHAPE = toys.Shape(prompt=9, vocabulary=128)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
MODALITIES = pytest.mark.parametrize("modality", toys.MODALITIES)
TRAINED = pytest.mark.parametrize("trained", peers.TRAINED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {modality: tmp_path_factory.mktemp(modality) for modality in toys.MODALITIES}
    for modality, folder in found.items():
        toys.make_model(folder, replace(SHAPE, modality=modality), **SIZES)
    return found


@pytest.fixture
def folder(folders):
    return folders["text"]


@MODALITIES
def test_prompts_and_completions_have_the_tokens_asked_for(folders, modality):
    processor = AutoProcessor.from_pretrained(folders[modality])
    kind = toys.MODALITIES[modality]
    for count in (5, 9, 20):
        shape = replace(SHAPE, prompt=count, modality=modality)
        row = kind.row(kind.prompt(shape, folders[modality]))
        ids = kind.read(processor, [row])["prompt_ids"]
        assert ids.shape == (1, count)
        pictured = int((ids == toys.VISION["image"]).sum())
        assert pictured == ({5: 1, 9: 4, 20: 16}[count] if modality == "vlm" else 0)
    work = toys.make_work(SHAPE, 3)
    assert [len(ids) for ids in work.completions] == [32, 64, 96]
    assert work.tokens == 192


@MODALITIES
def test_a_seed_draws_prompt_weights_completions_and_advantages(tmp_path, modality):
    kind = toys.MODALITIES[modality]
    drawn = []
    for seed in (0, 0, 1):
        shape = replace(SHAPE, modality=modality, seed=seed)
        folder = tmp_path / str(len(drawn))
        toys.make_model(folder, shape, **SIZES)
        weights = (folder / "model.safetensors").read_bytes()
        prompt = kind.prompt(shape, folder)
        picture = Path(prompt["images"]).read_bytes() if "images" in prompt else None
        drawn.append((weights, prompt["prompt"], picture, toys.make_work(shape, 3)))
    first, again, other = drawn
    assert first == again
    assert first[0] != other[0]
    assert first[1] != other[1]
    assert first[3].completions != other[3].completions
    assert first[3].advantages != other[3].advantages
    assert modality == "text" or first[2] != other[2]


def test_a_prompt_too_short_for_a_picture_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="3 tokens"):
        toys.MODALITIES["vlm"].prompt(replace(SHAPE, prompt=3, modality="vlm"), tmp_path)


@MODALITIES
@TRAINED
def test_our_forms_have_one_gradient_and_other_work_is_noticed(folders, modality, trained):
    shape = replace(SHAPE, trained=trained, modality=modality)
    peer = peers.open_peer("shared_prompt", folders[modality], shape, 3)
    work = toys.make_work(shape, 3)

    def found(form, work):
        peer.use(form).update(work)
        return peers.gradient(peer)

    expected = found("padded", work)
    for form in peers.OURS:
        assert peers.gradient_gap(found(form, work), expected) <= benchmark.TOLERANCE
    other = replace(work, advantages=work.advantages[::-1])
    gap = peers.gradient_gap(found("packed", other), expected)
    assert gap > 0.1
    with pytest.raises(SystemExit, match="packed"):
        benchmark.refuse_differences({"padded": 0.0, "packed": gap})


@MODALITIES
@TRAINED
@pytest.mark.filterwarnings("ignore")  # of TRL's, about what it uses itself
def test_trl_has_our_gradient_and_trains(folders, modality, trained):
    pytest.importorskip("trl")
    shape = replace(SHAPE, trained=trained, modality=modality)
    both = benchmark.open_peers(folders[modality], shape, 3)
    work = toys.make_work(shape, 3)
    benchmark.refuse_differences(benchmark.differences(both, work))
    trl = both[peers.TRL]
    assert isinstance(trl, peers.Trl)
    if modality == "vlm":
        trl._prompts["pixel_values"].neg_()  # another picture
        gaps = benchmark.differences(both, work)
        assert min(gaps[form] for form in peers.OURS) > 0.1
    for form in (peers.TRL, peers.TRL_COMPACT):
        before = {name: value.detach().clone() for name, value in trl.parameters().items()}
        assert 3 <= trl.use(form).step() <= 3 * toys.MAX_LENGTH
        assert any(not torch.equal(before[k], v) for k, v in trl.parameters().items())
        sampled = trl.trainer._buffered_inputs[0]["completion_ids"]
        assert not torch.isin(sampled, torch.tensor(toys.MODALITIES[modality].BANNED)).any()


def test_gradients_of_other_parameters_differ():
    one = {"a": torch.ones(2)}
    assert peers.gradient_gap({"b": torch.ones(2)}, one) == float("inf")
    assert peers.gradient_gap({"a": torch.tensor([1.0, 2.0])}, one) == pytest.approx(0.5**0.5)


@MODALITIES
def test_a_step_of_ours_trains(folders, modality):
    shape = replace(SHAPE, modality=modality)
    peer = peers.open_peer("shared_prompt", folders[modality], shape, 3)
    before = {name: value.detach().clone() for name, value in peer.parameters().items()}
    assert 3 <= peer.step() <= 3 * toys.MAX_LENGTH
    assert any(not torch.equal(before[k], v) for k, v in peer.parameters().items())


def test_turns_are_reversed():
    seen = []

    def run(form):
        seen.append(form)
        return 7

    costs = {"a": benchmark.Cost(), "b": benchmark.Cost()}
    benchmark.time_by_turns(costs, 1, run)
    benchmark.time_by_turns(costs, 2, run)
    assert seen == ["a", "b", "b", "a", "a", "b"]
    assert costs["a"].tokens == [7, 7, 7]
    assert len(costs["b"].cpu) == len(costs["b"].wall) == 3


def test_rates_are_medians_of_the_rounds():
    cost = benchmark.Cost(tokens=[10, 10, 30], cpu=[1.0, 2.0, 1.0], wall=[2.0, 4.0, 2.0])
    assert cost.cpu_rate == 10
    assert cost.wall_rate == 5


def test_memory_that_is_used_for_a_moment_is_seen(folder, monkeypatch):
    if not hasattr(benchmark.os, "sched_getaffinity"):
        pytest.skip("reads /proc")

    class Hungry:
        def update(self, work):
            # Not malloc's, which may still hold as much from a test before this one.
            with mmap.mmap(-1, 64 * benchmark.MIB if work is not benchmark.PROBE else 1) as pages:
                for start in range(0, len(pages), mmap.PAGESIZE):
                    pages[start] = 1

        def parameters(self):
            return {}

    monkeypatch.setattr(benchmark, "open_peer", lambda *_: Hungry())
    grown = benchmark.growth("padded", folder, SHAPE, toys.make_work(SHAPE, 3), 1)
    assert 60 * benchmark.MIB < grown < 80 * benchmark.MIB


def test_memory_is_measured_in_a_process_of_its_own(folder):
    if not hasattr(benchmark.os, "sched_getaffinity"):
        pytest.skip("reads /proc")
    grown = benchmark.in_a_process("padded", folder, SHAPE, toys.make_work(SHAPE, 3))
    assert 0 < grown < 200 * benchmark.MIB
    assert "MALLOC_MMAP_THRESHOLD_" not in benchmark.os.environ


@pytest.mark.filterwarnings("ignore")  # of TRL's, about what it uses itself
def test_the_whole_benchmark(tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl")
    # Five processes would spend their time on imports; one is tested above.
    monkeypatch.setattr(benchmark, "in_a_process", lambda *work: benchmark.growth(*work, 1))
    small = ["--prompts", "5", "--vocabularies", "128", "--trained", "lora", "--layers", "1"]
    rounds = ["--rounds", "1", "--step-rounds", "1", "--hidden", "32", "--group-size", "2"]
    seeds = ["--seeds", "0", "3"]
    assert benchmark.main([*small, *rounds, *seeds, "--out", str(tmp_path)]) == 0
    (written,) = tmp_path.glob("*language-update.json")
    text, vlm = cells = json.loads(written.read_text())["cells"]
    assert (text["shape"]["modality"], vlm["shape"]["modality"]) == ("text", "vlm")
    for cell in cells:
        assert tuple(cell["updates"]) == peers.FORMS
        for form in peers.FORMS:
            assert cell["gaps"][form] <= benchmark.TOLERANCE
            assert cell["growth"][form] >= 0  # so little may fit anyway
            assert len(cell["updates"][form]["cpu"]) == 2  # a round of each draw
    assert written.with_suffix(".png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "shared_prompt over TRL" in printed
    assert "| modality | trained |" in printed
    assert "| vlm | lora | 5 | 128 |" in printed
