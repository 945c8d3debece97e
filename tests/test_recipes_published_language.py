"""Full-size recipes of language models carry the published hyper-parameters.

The tables were copied from papers and released code, not from the recipes.  They are parts of
resolved configurations: what a table does not say is free.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

from mmrl.config import RunConfig, load
from mmrl.preflight import refuse_unless_consistent
from rewards.combine import RewardSpec

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FULL_SIZE = sorted(
    path.relative_to(CONFIGS)
    for kind in ("vlm", "text")
    for path in (CONFIGS / kind).glob("*/*.yaml")
    if not path.parent.name.startswith("tiny-")
)

# MMR1, arXiv:2509.21268: main text (scores), examples/mmr1.yaml (the rest).
VAS = """
backend:
  rollout: {max_tokens: 8192, temperature: 0.6, top_p: 1.0}
  prompts: {max_tokens: 2048}
prompts:
  sampler: {name: vas, weighted_share: 0.5, alpha: 0.8, beta: 0.2, refresh_every: 35,
            refresh_samples: 32}
optimizer: {learning_rate: 1.0e-6}
training: {prompts_per_step: 512, group_size: 8, updates_per_epoch: 1, num_epochs: 1}
"""

# OpenVLThinkerV2, arXiv:2604.08539: config_g2rpo.yaml and run_g2rpo_rl_slurm.sh.
G2RPO = """
backend:
  images: {min_pixels: 3136, max_pixels: 1048576}
  rollout: {max_tokens: 4096, temperature: 1.0}
  prompts: {max_tokens: 16384}
advantage: {name: g2rpo, second_stage: true}
objective: {name: grpo, clip_low: 0.2, clip_high: 0.3, dual_clip: 3.0}
optimizer: {learning_rate: 2.0e-6, weight_decay: 1.0e-2}
training: {prompts_per_step: 512, group_size: 8, updates_per_epoch: 4,
           aggregation: decision_mean}
regularisers: []
"""

# Qwen3-4B-Base-GRPO, arXiv:2604.13016: the card of the released model.
GRPO = """
backend:
  model: {path: Qwen/Qwen3-4B-Base, lora: null}
  rollout: {max_tokens: 7168, temperature: 1.0}
  evaluation: {max_tokens: 31744}
  prompts: {max_tokens: 1024}
objective: {name: grpo}
regularisers: []
optimizer: {learning_rate: 1.0e-6}
training: {group_size: 8, aggregation: decision_mean}
"""


def missing(wanted, found, where=""):
    """Places where a table and a configuration differ."""
    if isinstance(wanted, dict):
        parts = (missing(v, found.get(k), f"{where}.{k}") for k, v in wanted.items())
        return [line for part in parts for line in part]
    return [] if wanted == found else [f"{where}: {found} is not {wanted}"]


@pytest.mark.parametrize(
    ("path", "table"),
    [
        ("vlm/qwen2.5-vl-7b/vas.yaml", VAS),
        ("vlm/qwen3-vl-8b/g2rpo.yaml", G2RPO),
        ("text/qwen3-4b/grpo-math.yaml", GRPO),
    ],
)
def test_published_values(path, table):
    config = load(CONFIGS / path)
    refuse_unless_consistent(config)
    assert missing(yaml.safe_load(table), config.dump()) == []


def test_the_penalty_of_vas_is_the_low_variance_estimator():
    (penalty,) = load(CONFIGS / "vlm/qwen2.5-vl-7b/vas.yaml").dump()["regularisers"]
    assert (penalty["name"], penalty["estimator"], penalty["coef"]) == ("kl_reference", "k3", 0.01)


def specs(config: RunConfig, name: str) -> list[RewardSpec]:
    """The rewards of that name."""
    return [spec for spec in config.rewards if spec.name == name]


def well_formed(config: RunConfig, thought: str, answer: str) -> str:
    """A completion in the tags that the recipe rewards, else one with its answer in a box."""
    formats = specs(config, "format_tags")
    if not formats:
        return f"{thought}, so \\boxed{{{answer}}}"
    *before, last = formats[0].config.model_dump()["tags"]
    parts = [f"<{tag}>{thought}</{tag}>\n" for tag in before]
    return "".join([*parts, f"<{last}>{answer}</{last}>"])


@pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed"
)
@pytest.mark.parametrize("path", FULL_SIZE, ids=str)
def test_a_well_formed_right_answer_is_worth_1(path):
    config = load(CONFIGS / path)
    texts = [
        well_formed(config, "x", "7"),
        well_formed(config, "3 + 4 is not 5", "7"),
        well_formed(config, "3 + 4 is 7", "5"),
    ]
    judges = [spec for spec in config.rewards if hasattr(spec.config, "reads")]
    assert judges
    for spec in judges:
        found = spec.build()(["p"] * 3, texts, answer=["7"] * 3)
        assert found.tolist() == [1, 1, 0], spec.label
    for spec in specs(config, "format_tags"):
        assert spec.build()(["p"] * 3, texts).tolist() == [1, 1, 1], spec.label


def test_the_model_of_g2rpo_is_asked_for_the_tags_that_are_rewarded():
    config = load(CONFIGS / "vlm/qwen3-vl-8b/g2rpo.yaml")
    system = config.dump()["backend"]["prompts"]["system"]
    (form,) = specs(config, "format_tags")
    for tag in form.config.model_dump()["tags"]:
        assert f"<{tag}>" in system
        assert f"</{tag}>" in system
