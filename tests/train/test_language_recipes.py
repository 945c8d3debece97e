"""Recipes on the shipped tiny language models: they train, resume to the bit, and load elsewhere.

Shortened.  And one objective trains images, pictures with text, and text alone.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from toy.run import ROOT, column, metrics_of, small_config, weights_of

from mmrl.config import load, parse
from mmrl.objectives import grpo
from mmrl.runner import train

RECIPES = {
    "text": ROOT / "configs" / "text" / "tiny-qwen" / "grpo-arithmetic.yaml",
    "vlm": ROOT / "configs" / "vlm" / "tiny-qwen-vl" / "g2rpo-vas.yaml",
}
MODELS = {"text": ROOT / "assets" / "tiny-qwen", "vlm": ROOT / "assets" / "tiny-qwen-vl"}
CLASSES = {"text": "Qwen3ForCausalLM", "vlm": "Qwen3VLForConditionalGeneration"}
SHORT = (
    "evaluation.max_prompts=3",
    "evaluation.samples_per_prompt=1",
    "evaluation.every=2",
    "checkpoint.every=1",
    "tracking.trackers=[]",
    "training.prompts_per_step=4",
    "training.group_size=4",
    "training.micro_batch_size=6",
    "optimizer.warmup_updates=0",
)
EVERY = pytest.mark.parametrize("name", list(RECIPES))


def run(name: str, folder: Path, steps: int, *overrides: str, resume: bool = False) -> Path:
    recipe = load(RECIPES[name], [])
    sources = {
        "backend.model.path": MODELS[name],
        "prompts.source": ROOT / str(recipe.prompts.source),
        "evaluation.source": ROOT / str(recipe.evaluation.source),
        "output_dir": folder,
        "training.num_steps": steps,
    }
    given = [f"{key}={value}" for key, value in sources.items()]
    return train(load(RECIPES[name], [*given, *SHORT, *overrides]), resume=resume)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Run folders by recipe, each of three steps."""
    torch.set_num_threads(1)
    return {name: run(name, tmp_path_factory.mktemp(name), 3) for name in RECIPES}


@EVERY
def test_it_trains(name, unbroken):
    losses = column(unbroken[name], "loss")
    assert len(losses) == 3
    assert all(math.isfinite(loss) for loss in losses)
    assert any(norm > 0 for norm in column(unbroken[name], "grad_norm"))
    lengths = column(unbroken[name], "completions/mean_length")
    assert all(5 < length < 40 for length in lengths)


@EVERY
def test_a_resumed_run_is_bit_identical(name, unbroken, tmp_path):
    run(name, tmp_path, 2)
    run(name, tmp_path, 3, resume=True)
    assert metrics_of(tmp_path) == metrics_of(unbroken[name])
    left, right = weights_of(unbroken[name]), weights_of(tmp_path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@EVERY
def test_the_final_folder_loads_in_transformers(name, unbroken):
    import transformers

    kind = getattr(transformers, CLASSES[name])
    final, base = kind.from_pretrained(unbroken[name] / "final"), kind.from_pretrained(MODELS[name])
    processor = transformers.AutoProcessor.from_pretrained(unbroken[name] / "final")
    changed = [
        key
        for (key, new), old in zip(
            final.state_dict().items(), base.state_dict().values(), strict=True
        )
        if not torch.equal(new, old)
    ]
    assert changed
    assert not any("visual" in key for key in changed), "the tower stays"
    assert processor.apply_chat_template(
        [{"role": "user", "content": "2 + 2 = ?"}], tokenize=False, add_generation_prompt=True
    ) == "<|im_start|>user\n2 + 2 = ?<|im_end|>\n<|im_start|>assistant\n"  # fmt: skip


@pytest.mark.parametrize("name", ["diffusion", *RECIPES])
def test_one_objective_trains_every_backend(name, tmp_path, monkeypatch):
    """The same function, and each loss it gives is PPO's by the book."""
    shapes, own = [], grpo.loss

    def watched(terms, batch, config):
        found = own(terms, batch, config)
        ratio = (terms.logp - batch.logp_old).exp()
        advantage = batch.advantages[:, None]
        kept = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        wanted = -torch.minimum(ratio * advantage, kept * advantage)
        torch.testing.assert_close(
            found.loss[batch.mask].double(), wanted[batch.mask].double(), rtol=1e-5, atol=1e-6
        )
        shapes.append(tuple(batch.mask.shape))
        return found

    monkeypatch.setattr(grpo, "loss", watched)
    objective = "objective={name: grpo, clip_low: 0.2, clip_high: 0.2}"
    if name == "diffusion":
        judged = "[{name: jpeg_compressibility}]"
        overrides = (f"rewards={judged}", f"evaluation.rewards={judged}")
        config = small_config(tmp_path, objective, *overrides, "training.num_steps=1")
        folder = train(parse(config))
    else:
        folder = run(name, tmp_path / "run", 1, objective)
    assert len(shapes) >= 2
    assert all(width > 1 for _, width in shapes)
    assert any(norm > 0 for norm in column(folder, "grad_norm"))
