"""What a run leaves: adapters for peft, folders for transformers, and code that uses them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_text import make_backend, make_batch, make_requests
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mmrl.card import usage
from mmrl.text.scoring import own_logp
from mmrl.weights import trainable

# peft asks transformers by a name that it is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
FORMS = pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])


def trained(folder, lora):
    backend = make_backend(folder, model={"lora": lora})
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(backend.model).values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backend


def load(folder, lora):
    from peft import AutoPeftModelForCausalLM

    kind = AutoModelForCausalLM if lora is None else AutoPeftModelForCausalLM
    return kind.from_pretrained(folder)


@FORMS
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_plain_libraries_score_as_we_do(folders, tmp_path, name, lora):
    backend = trained(folders[name], lora)
    batch = make_batch(backend, list(backend.rollout(make_requests())))
    expected = backend.evaluate(batch, frozenset({"logp"})).logp
    backend.export(tmp_path, "the card")
    assert (tmp_path / "README.md").read_text() == "the card"
    loaded = load(tmp_path, lora)
    for i, row in enumerate(batch.payload):
        with torch.no_grad():
            found = own_logp(loaded, row)
        torch.testing.assert_close(
            found, expected[i, : len(row.completion)].detach(), rtol=1e-4, atol=1e-5
        )


@FORMS
def test_the_tokenizer_and_its_template_come_along(folders, tmp_path, lora):
    backend = trained(folders["qwen3"], lora)
    backend.export(tmp_path, "")
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (tmp_path, folders["qwen3"]))
    assert ours.chat_template == theirs.chat_template
    assert ours("go up").input_ids == theirs("go up").input_ids


@FORMS
def test_how_the_model_generates_comes_along(folders, tmp_path, lora):
    base = shutil.copytree(folders["qwen3"], tmp_path / "base")
    file = base / "generation_config.json"
    settings = json.loads(file.read_text()) | {"repetition_penalty": 1.25}
    file.write_text(json.dumps(settings))
    trained(base, lora).export(tmp_path / "final", "")
    ours, theirs = (GenerationConfig.from_pretrained(f) for f in (tmp_path / "final", base))
    assert ours.repetition_penalty == 1.25
    assert ours == theirs


@FORMS
@pytest.mark.parametrize("prompts", [{}, {"chat": False}, {"system": "add and"}])
@pytest.mark.parametrize("evaluation", [{}, {"temperature": 0.0}])
def test_the_code_on_the_card_runs(
    folders, tmp_path, monkeypatch, capsys, lora, prompts, evaluation
):
    backend = trained(folders["qwen3"], lora)
    backend.export(tmp_path, "")
    monkeypatch.chdir(tmp_path)
    section = backend.config.model_dump() | {"prompts": prompts, "evaluation": evaluation}
    source = usage({"backend": {"name": "text", **section}})
    exec(compile(source, "card", "exec"), {})
    assert capsys.readouterr().out.count("\n") == 1, "one line: the completion, maybe empty"
    assert ("do_sample=False" in source) == bool(evaluation)
    assert ("apply_chat_template" in source) == (prompts.get("chat") is not False)
    assert ("add and" in source) == ("system" in prompts)
