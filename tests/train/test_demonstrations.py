"""`sft` on completions of the data set: transformers' own loss, the split, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from test_text_runs import close
from test_text_runs import config as text_config
from toy.run import ROOT, column, launch, metrics_of, toy_config, weights_of
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from mmrl.config import apply_overrides, parse
from mmrl.errors import UserError
from mmrl.preflight import refuse_unless_consistent
from mmrl.runner import train
from mmrl.text.config import RolloutConfig
from mmrl.text.demonstrations import encode_demonstrations
from mmrl.types import Prompt

sys.path.insert(0, str(ROOT / "tests" / "text"))
sys.path.insert(0, str(ROOT / "tests" / "vlm"))

import tiny_text
import tiny_vlm

ROWS = [
    {"prompt": "go to red", "completion": "red blue green"},
    {"prompt": "go to up", "completion": "up"},
    {"prompt": "go to red", "completion": [{"role": "assistant", "content": "sky and sea <end>"}]},
    {"prompt": "cat or dog ?", "completion": "not two"},
]
WHOLE = (
    "backend.model.lora=null",
    "backend.rollout.demonstrations=completion",
    "objective=sft",
    "advantage=none",
    "rewards=[]",
    "regularisers=[]",
    "training={num_steps: 1, prompts_per_step: 4, group_size: 1, micro_batch_size: 3}",
    "optimizer.max_grad_norm=1e9",
    "evaluation.rewards=[{name: toy.rewards.says_red, label: red}]",
)
LONGER = ("training.num_steps=12", "optimizer.learning_rate=0.01", "evaluation.every=12")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_text.save_model(tmp_path_factory.mktemp("model"), "qwen3")


def write(data: dict, rows: list[dict]) -> dict:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(data["prompts"]["source"]).write_text(text)
    return data


def config(model: Path, folder: Path, *overrides: str, rows=ROWS) -> dict:
    return write(text_config(model, folder, *WHOLE, *overrides), rows)


def run(*given, **options) -> Path:
    return train(parse(config(*given, **options)))


def labelled(network, encoded) -> tuple[float, float]:
    """Loss of ``(prompt ids, completion ids, options)`` as transformers has it by ``labels``, over
    all of their tokens, and the norm of its gradient.
    """
    count = sum(len(completion) for _, completion, _ in encoded)
    total = torch.zeros(())
    for prompt, completion, options in encoded:
        ids = torch.tensor([[*prompt, *completion]])
        labels = torch.tensor([[-100] * len(prompt) + [*completion]])
        found = network(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, **options
        )
        total = total + found.loss * len(completion) / count
    total.backward()
    norms = [p.grad.norm() for p in network.parameters() if p.grad is not None]
    return float(total.detach()), float(torch.stack(norms).norm())


def chat(tokenizer, text: str) -> list[int]:
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_loss_and_gradient_of_a_text_model_are_those_of_transformers(model, tmp_path):
    path = run(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    said = ["red blue green <end>", "up <end>", "sky and sea <end>", "not two <end>"]
    encoded = [
        (chat(tokenizer, row["prompt"]), tokenizer(text).input_ids, {})
        for row, text in zip(ROWS, said, strict=True)
    ]
    loss, norm = labelled(AutoModelForCausalLM.from_pretrained(model), encoded)
    assert column(path, "loss") == [pytest.approx(loss, rel=1e-5)]
    assert column(path, "nll") == [pytest.approx(loss, rel=1e-5)]
    assert column(path, "grad_norm") == [pytest.approx(norm, rel=1e-5)]
    assert column(path, "completions/mean_length") == [sum(len(c) for _, c, _ in encoded) / 4]
    assert not {"reward", "invalid_samples"} & metrics_of(path)[1].keys(), "nothing judged them"
    assert "eval/red" in metrics_of(path)[0], "held-out prompts are sampled and judged"


def test_loss_and_gradient_of_a_vlm_are_those_of_transformers(tmp_path):
    family = "qwen3_vl"
    folder = tiny_vlm.save_model(tmp_path / "model", family)
    prompts = tiny_vlm.save_pictures(tmp_path)
    said = ["red", "green and blue", "sky"]
    options = ("backend.name=vlm", f"backend.model.family={family}", "evaluation.source=null")
    data = text_config(folder, tmp_path, *options, *WHOLE, "training.prompts_per_step=3")
    data["backend"] |= {"images": {"min_pixels": 784, "max_pixels": 7000}}
    rows = [
        {"prompt": prompt.text, **prompt.columns, "completion": text}
        for prompt, text in zip(prompts, said, strict=True)
    ]
    path = train(parse(write(data, rows)))
    backend = tiny_vlm.make_backend(folder, family, prompts)
    network = AutoModelForImageTextToText.from_pretrained(folder)
    network.base_model.visual.requires_grad_(False)
    encoded = []
    for prompt, text in zip(prompts, said, strict=True):
        known = backend._prompts[prompt.id]
        completion = backend._tokenizer(f"{text} <end>").input_ids
        kinds = torch.tensor([[*known.ids, *completion]]) == network.config.image_token_id
        inputs = {"mm_token_type_ids": kinds.int(), **known.inputs} if known.inputs else {}
        encoded.append((known.ids, completion, inputs))
    loss, norm = labelled(network, encoded)
    assert column(path, "loss") == [pytest.approx(loss, rel=1e-5)]
    assert column(path, "grad_norm") == [pytest.approx(norm, rel=1e-4)]


@pytest.fixture(scope="module")
def learnt(model, tmp_path_factory):
    return run(model, tmp_path_factory.mktemp("learnt"), *LONGER)


def test_demonstrations_become_likely(learnt):
    found = column(learnt, "nll")
    assert found[-1] < 0.5 * found[0]
    assert found == sorted(found, reverse=True)


def test_neither_the_micro_batch_nor_processes_nor_a_kill_matter(model, learnt, tmp_path):
    close(learnt, run(model, tmp_path / "one", *LONGER, "training.micro_batch_size=1"))
    half = run(model, tmp_path / "cut", *LONGER, "training.num_steps=6")
    assert train(parse(config(model, tmp_path / "cut", *LONGER)), resume=True) == half
    left, right = weights_of(learnt), weights_of(half)
    assert all(torch.equal(left[name], right[name]) for name in left)
    done = launch(config(model, tmp_path / "two", *LONGER), tmp_path / "two.yaml", processes=2)
    assert done.returncode == 0, done.stdout + done.stderr
    close(learnt, tmp_path / "two" / "run")


def test_rewards_may_watch(model, tmp_path):
    path = run(model, tmp_path, "rewards=[{name: toy.rewards.says_red, label: red}]")
    assert column(path, "rewards/red/mean") == [pytest.approx((1 / 3) / 4)]
    other = run(model, tmp_path / "none")
    assert column(path, "loss") == column(other, "loss")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("objective=grpo",), r"demonstrations: 'completion': objective: 'grpo' .* with it: sft"),
        (("objective=reinforce",), r"objective: 'reinforce'"),
        (("advantage={name: group}",), r"'group'.* allowed with it: none"),
        (("training.group_size=4",), r"training.group_size is 4 .* allowed: 1"),
        (("prompts.budget=knapsack",), r"prompts.budget; allowed: 1"),
        (("correction=importance_sampling",), r"'importance_sampling'.*: null"),
        (("selection=[pf_ppo]",), r"selection\[0\]: 'pf_ppo'"),
        (("modulators=[clip]",), r"modulators\[0\]: 'clip'"),
        (("regularisers=[{name: kl_reference, coef: 0.1}]",), r"regularisers\[0\]: 'kl_reference'"),
        (("training.refills=1",), r"training.refills goes by samples"),
        (("kl_in_reward={coef: 0.1}",), r"kl_in_reward goes by samples"),
        (("prompts.sampler=vas",), r"prompts.sampler: 'vas' goes by samples"),
        (("backend.rollout.temperature=0.7",), r"rollout.temperature = 0.7 .* allowed: 1.0"),
        (("backend.rollout.top_k=5",), r"rollout.top_k = 5 .* allowed: None"),
        (("backend.rollout.drop_overlong=true",), r"rollout.drop_overlong"),
        (("backend.rollout.demonstration=completion",), r"did you mean 'demonstrations'"),
        (("backend.rollout.demonstrations=null",), r"rewards: \[\] is empty; allowed: at least 1"),
    ],
)
def test_what_demonstrations_contradict_is_refused(model, tmp_path, overrides, match):
    with pytest.raises(UserError, match=match):
        refuse_unless_consistent(parse(config(model, tmp_path, *overrides)))


def test_an_entropy_bonus_and_a_penalty_without_weight_are_not(model, tmp_path):
    both = "regularisers=[{name: entropy, coef: 0.1}, {name: kl_reference, coef: 0}]"
    refuse_unless_consistent(parse(config(model, tmp_path, both)))


def test_other_backends_need_a_reward(tmp_path):
    data = apply_overrides(toy_config(tmp_path), ["rewards=[]"])
    with pytest.raises(UserError, match="at least 1"):
        refuse_unless_consistent(parse(data))


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"prompt": "up"}, r"prompts.jsonl:5: no column 'completion'.*did you mean 'completions'"),
        ({"prompt": "up", "completion": " "}, r"prompts.jsonl:5: .*'completion'.* is empty"),
        (
            {"prompt": "up", "completion": "up " * 6},
            r"'up'.*has 7 tokens with its end; allowed: .*6",
        ),
        ({"prompt": "up", "completion": 7}, r"'up'.*is 7; allowed: a text"),
        (
            {"prompt": "up", "completion": [{"role": "user", "content": "up"}]},
            r"allowed: .*'assistant'",
        ),
    ],
)
def test_rows_without_a_usable_demonstration_are_named(model, tmp_path, row, match):
    rows = [*ROWS, {"completions": "up", **row}]
    with pytest.raises(UserError, match=match):
        run(model, tmp_path, rows=rows)


def test_a_demonstration_elsewhere_in_the_row(model, tmp_path):
    rows = [{"prompt": row["prompt"], "said": {"best": row["completion"]}} for row in ROWS]
    options = ("prompts.keys={completion: said.best}", "evaluation.source=null")
    first, second = run(model, tmp_path / "a", *options, rows=rows), run(model, tmp_path / "b")
    assert column(first, "loss") == pytest.approx(column(second, "loss"), rel=1e-6)


def test_tokens_of_pictures_and_a_tokenizer_without_an_end():
    tokenizer, chosen = tiny_text.tokenizer(), RolloutConfig(demonstrations="said")
    prompts = [Prompt(id="p", text="go", columns={"said": "red up"}), Prompt(id="q", text="up")]
    (found,) = encode_demonstrations(tokenizer, prompts, chosen).values()
    assert tokenizer.decode(found.ids) == "red up <end>"
    assert found.finished
    assert encode_demonstrations(tokenizer, prompts, RolloutConfig()) == {}
    with pytest.raises(UserError, match="stand for pictures"):
        encode_demonstrations(tokenizer, prompts, chosen, forbidden=found.ids[:1])
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        encode_demonstrations(tokenizer, prompts, chosen)
