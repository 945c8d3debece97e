"""What a user can get wrong before a text model trains."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_text import PROMPTS, make_backend, make_config, make_requests, save_model

from mmrl.errors import UserError
from mmrl.schema import validate
from mmrl.text.config import Config, PromptConfig
from mmrl.text.estimate import describe, estimate_memory
from mmrl.text.loading import Room, encode, load_tokenizer
from mmrl.types import Prompt
from mmrl.weights import trainable


def refused(section: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        validate(Config, {"model": {"path": "x"}} | section, "backend")


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"rollout": {"temperature": 0}}, "temperature = 0 gives every sample"),
        ({"rollout": {"max_token": 5}}, "max_tokens"),
        ({"rollout": {"top_p": 0}}, "top_p"),
        ({"update": "shared"}, "shared_prompt"),
        ({"prompts": {"chat": False, "system": "be brief"}}, "needs a chat template"),
        ({"model": {}}, "path"),
    ],
)
def test_sections_that_cannot_work(section, match):
    refused(section, match)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.* does not exist"):
        make_backend(tmp_path / "nowhere")


def test_completions_that_leave_no_room_for_prompts(folders):
    with pytest.raises(UserError, match=r"max_tokens = 128 leaves no room .* 128 positions"):
        make_backend(folders["qwen3"], {"max_tokens": 128})


def test_a_folder_without_a_tokenizer(tmp_path, folders):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folders["llama"] / name, tmp_path / name)
    with pytest.raises(UserError, match="has no tokenizer"):
        make_backend(tmp_path)


def test_modules_that_are_not_there(folders):
    lora = {"rank": 4, "alpha": 8, "target_modules": ["query"]}
    with pytest.raises(UserError, match=r"target_modules = \['query'\]"):
        make_backend(folders["qwen3"], model={"lora": lora})


@pytest.mark.parametrize("prompts", [{"chat": True}, {"system": "add"}])
def test_a_chat_template_that_is_missing(tmp_path, folders, prompts):
    shutil.copytree(folders["qwen3"], tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        make_backend(tmp_path / "plain", prompts=prompts)
    backend = make_backend(tmp_path / "plain")
    assert len(backend._prompts["p"].ids) == len(PROMPTS[0].text.split())


def test_prompts_that_are_too_long(folders):
    message = r"'add two .*' has 13 tokens; allowed: 1 to 12 \(backend\.prompts\.max_tokens\)"
    with pytest.raises(UserError, match=message):
        make_backend(folders["qwen3"], prompts={"max_tokens": 12})
    message = r"1 to 8 \(the model's 128 positions less backend\.rollout\.max_tokens = 120\)"
    for own in (None, 9):
        with pytest.raises(UserError, match=message):
            make_backend(folders["qwen3"], {"max_tokens": 120}, prompts={"max_tokens": own})


def test_an_empty_prompt(folders):
    tokenizer = load_tokenizer(str(folders["qwen3"]))
    with pytest.raises(UserError, match="has 0 tokens"):
        encode(tokenizer, [Prompt(id="e", text="")], PromptConfig(chat=False), Room(9, ""))


def test_the_row_of_a_prompt_is_named(folders):
    tokenizer = load_tokenizer(str(folders["qwen3"]))
    prompt = Prompt(id="e", text="go up", where="prompts.source: a.jsonl:7")
    words = r"^prompts\.source: a\.jsonl:7: prompt 'go up' has 2 tokens; allowed: 1 to 1 \(key\)"
    with pytest.raises(UserError, match=words):
        encode(tokenizer, [prompt], PromptConfig(chat=False), Room(1, "key"))


def test_an_unknown_prompt_is_named(folders):
    backend = make_backend(folders["qwen3"])
    with pytest.raises(ValueError, match="'else' was not among"):
        next(backend.rollout(make_requests(prompts=[Prompt(id="z", text="else")])))


@pytest.mark.parametrize("update", ["shared_prompt", "packed", "padded"])
def test_a_network_that_is_scored_otherwise_than_it_samples(tmp_path, update, monkeypatch):
    """Granite divides its logits, which the head alone does not know."""
    import transformers

    config = transformers.GraniteConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=7.0, eos_token_id=2,
        bos_token_id=None, pad_token_id=0, initializer_range=0.5,
    )  # fmt: skip
    save_model(tmp_path, "qwen3")
    transformers.GraniteForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not score GraniteForCausalLM .* differ by"):
        make_backend(tmp_path, update=update)


def test_truncated_sampling_is_said(folders):
    notes = make_backend(folders["qwen3"], {"top_k": 3}).notes
    assert any("another distribution" in note for note in notes)
    assert not any("another" in note for note in make_backend(folders["qwen3"]).notes)


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8}, None])
def test_sizes_are_known_without_loading(folders, lora):
    config = make_config(folders["qwen3"], model={"lora": lora})
    backend = make_backend(folders["qwen3"], model={"lora": lora})
    parameters = dict(backend.model.named_parameters())
    live = trainable(backend.model)
    count = sum(p.numel() for p in live.values())
    memory = estimate_memory(config)
    assert memory["weights"] == sum(p.numel() * p.element_size() for p in parameters.values())
    assert memory["gradients_and_optimizer"] == 12 * count
    lines = "\n".join(describe(config))
    assert f"trained: {count:,} parameters" in lines
    assert "Qwen3ForCausalLM" in lines
    assert json.loads((folders["qwen3"] / "config.json").read_text())["model_type"] == "qwen3"
