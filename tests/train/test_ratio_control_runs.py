"""One step of every ratio-control loss on each kind of policy: text, pictures with text, and images
by both likelihoods.  The same rollout every time, and no micro-batch size shows.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_language_recipes import MODELS, RECIPES
from test_recipes import ROOT, short
from toy.run import small_config

from mmrl.checkpoint import Progress
from mmrl.config import RunConfig, load, parse, parse_part
from mmrl.resolve import names
from mmrl.runner import make_trainer, open_session
from mmrl.sharding import trainable, whole, write
from mmrl.trainer import Trainer

OBJECTIVES = [
    {"name": "grpo"},
    {"name": "cispo"},
    {"name": "sapo"},
    {"name": "mhpo"},
    {"name": "gbpo", "temperature": 1.0},
    {"name": "etr"},
    {"name": "r2vpo"},
    {"name": "mdpo_mirror"},
    {"name": "p3o_pairwise", "form": "joint"},
    {"name": "real"},
    {"name": "real", "form": "bce"},
]
WHOLE = [
    {"name": "grpo", "importance": "sample"},
    {"name": "p3o_pairwise"},
    {"name": "mdpo_mirror", "form": "squared"},
]
"""Those for which a micro-batch must hold all decisions of its samples."""
OF_STEPS = [
    {"name": "mdpo_mirror", "form": "gaussian_kl"},
    {"name": "grpo_guard", "clip_low": 0.2, "clip_high": 0.2},
]
"""Those of denoising steps alone."""
PENALTIES = {"transition": [{"name": "orpo_occupancy", "form": "step_chi2", "coef": 1.0}]}
"""Of ``grpo``, by the kind of policy."""
EVERYWHERE = (
    "training.num_steps=1",
    "training.updates_per_epoch=2",
    "training.aggregation=sample_mean_of_means",
    "training.horizon=null",
    "advantage={name: group, deviation: none}",
    "modulators=[]",
    "regularisers=[]",
    "tracking.trackers=[]",
    # Near a plain gradient step: Adam itself would turn the last bits of a sum into a sign.
    "optimizer={learning_rate: 1.0, eps: 10.0, weight_decay: 0}",
)


def language(name: str, folder) -> RunConfig:
    recipe = load(RECIPES[name], [])
    return load(
        RECIPES[name],
        [
            f"backend.model.path={MODELS[name]}",
            f"prompts.source={ROOT / str(recipe.prompts.source)}",
            f"evaluation.source={ROOT / str(recipe.evaluation.source)}",
            f"output_dir={folder}",
            "training.prompts_per_step=3",
            "training.group_size=4",
            *(["training.refills=0"] if recipe.training.refills else []),
            *EVERYWHERE,
        ],
    )


def diffusion(likelihood: str, folder) -> RunConfig:
    judged = "[{name: jpeg_compressibility}]"
    if likelihood == "matching":
        more = (f"rewards={judged}", f"evaluation.rewards={judged}")
        return parse(small_config(folder, *more, *EVERYWHERE))
    recipe = ROOT / "configs" / "diffusion" / "tiny-sd3" / "flow-grpo-fast.yaml"
    # Means over latent dimensions have small gradients.
    own = ("backend.likelihood.kernel=flow_sde", "optimizer.learning_rate=300")
    return load(recipe, short(recipe, folder, folder, *EVERYWHERE, *own, "training.group_size=3"))


def test_no_objective_with_a_ratio_is_missing():
    rows = [*OBJECTIVES, *WHOLE, *OF_STEPS]
    without = {"sft", "nft", "opd", "reinforce"}
    assert {row["name"] for row in rows} == set(names("objectives")) - without


def updated(trainer: Trainer, before, objective: dict, penalties: list[dict], size: int):
    """Change of all trained weights by one step, and what the step logged."""
    parts = {
        "objective": parse_part("objectives", objective, "objective"),
        "regularisers": [parse_part("regularisers", row, "regularisers") for row in penalties],
        "training": trainer.config.training.model_copy(update={"micro_batch_size": size}),
    }
    trainer.config = trainer.config.model_copy(update=parts)
    trainer.progress = Progress()
    network = trainable(trainer.backend.model)
    write(network, before)
    trainer.optimizer.state.clear()
    logged = trainer.step()
    after = whole(trainable(trainer.backend.model))
    return torch.cat([(after[name] - old).flatten() for name, old in before.items()]), logged


@pytest.mark.parametrize("kind", ["text", "vlm", "matching", "transition"])
def test_every_ratio_control_loss_trains(kind, tmp_path, monkeypatch):
    config = (language if kind in RECIPES else diffusion)(kind, tmp_path)
    trainer = make_trainer(open_session(config))
    rolled, own = [], Trainer._collect

    def once(self, requests, means):
        rolled.extend([] if rolled else [own(self, requests, means)])
        return rolled[0]

    monkeypatch.setattr(Trainer, "_collect", once)
    before = {name: x.clone() for name, x in whole(trainable(trainer.backend.model)).items()}
    decisions = config.backend.config.num_decisions or 1
    cases = [(objective, [], 2) for objective in OBJECTIVES]
    cases += [(objective, [], max(decisions, 2)) for objective in WHOLE]
    cases += [(objective, [], 2) for objective in OF_STEPS if kind == "transition"]
    cases += [(OBJECTIVES[0], [penalty], 2) for penalty in PENALTIES.get(kind, ())]
    try:
        for case in cases:
            objective, penalties, least = case
            large, logged = updated(trainer, before, objective, penalties, 1000)
            small, _ = updated(trainer, before, objective, penalties, least)
            assert math.isfinite(logged["loss"]), case
            assert logged["grad_norm"] > 0, case
            assert logged["approx_kl"] > 0, f"{case}: the second update is not at ratio 1"
            assert all(logged[penalty["name"]] > 0 for penalty in penalties), case
            # float32 sums in another order, of other shapes, through two updates.
            assert (small - large).norm() <= 2e-3 * large.norm(), case
    finally:
        trainer.scorer.close()
