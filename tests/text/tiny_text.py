"""Language models small enough to compare number by number: random weights, real architectures."""

from __future__ import annotations

import torch

from mmrl.text.backend import build
from mmrl.text.config import Config
from mmrl.types import Prompt, RolloutRequest, UpdateBatch

CPU = torch.device("cpu")
WORDS = (
    "zero one two three four five six seven eight nine ten add and or not to go up down left right "
    "red green blue cat dog sun sky sea sign user assistant system : . ?"
).split()
PROMPTS = [
    Prompt(id="p", text="go up and down"),
    Prompt(id="q", text="add two to seven . not nine ?"),
    Prompt(id="r", text="red"),
]
CHAT = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
ARCHITECTURES = ("qwen3", "qwen2", "llama")


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<end>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    )
    found.chat_template = CHAT
    return found


def network(name: str, **changes):
    import transformers

    kind = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[name]
    options = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": name == "qwen3",
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 2,
        "initializer_range": 0.3,
    }
    options |= {"head_dim": 8} if name == "qwen3" else {}
    config = getattr(transformers, f"{kind}Config")(**options | changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, f"{kind}ForCausalLM")(config)


def save_model(folder, name: str, **changes):
    network(name, **changes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def make_config(folder, rollout=None, **changes) -> Config:
    model = {"path": str(folder), "dtype": "fp32", "lora": {"rank": 4, "alpha": 8}}
    model |= changes.pop("model", {})
    sampled = {"max_tokens": 6} | (rollout or {})
    return Config.model_validate({"model": model, "rollout": sampled, **changes})


def make_backend(folder, rollout=None, needs=("logp",), **changes):
    config = make_config(folder, rollout, **changes)
    return build(config, device=CPU, prompts=PROMPTS, seed=0, needs=frozenset(needs))


def make_requests(group_size=4, seed=7, prompts=PROMPTS):
    return [
        RolloutRequest(prompt=p, group_size=group_size, seed=seed, stream=0, index=i)
        for i, p in enumerate(prompts)
    ]


def make_batch(backend, groups, advantages=None):
    rows = [(group, i) for group in groups for i in range(group.request.group_size)]
    payload, mask = backend.collate(rows)
    values = torch.ones(len(rows)) if advantages is None else torch.tensor(advantages)
    return UpdateBatch(
        payload=payload,
        mask=mask,
        advantages=values.double(),
        weights=torch.ones(len(rows), dtype=torch.float64),
    )
