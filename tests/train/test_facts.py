"""What estimators read of samples beside rewards: found, gathered, and refused where missing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from test_distributed import assert_same_trajectory, launch, torchrun
from test_resume import made
from toy.run import metrics_of, toy_config

from mmrl import facts
from mmrl.config import apply_overrides, parse
from mmrl.errors import UserError
from mmrl.preflight import refuse_unless_consistent
from mmrl.types import Prompt, RolloutGroup, RolloutRequest, Scores
from rewards.combine import parse_specs

READS_FACTS = (
    "advantage={name: optimal_baseline}",
    "modulators=[{name: adora, success: -4.0, rule: llm}]",
)
READS_FEATURES = (
    "advantage={name: subpo, function: log_det, reward_weight: 0.5}",
    "rewards.0.name=toy.rewards.likeness",
)
KEEPS_STATE = ("advantage={name: riskpo, bundle_size: 2}",)


def group(outputs, mask, everything=None, truncated=None) -> RolloutGroup:
    request = RolloutRequest(
        prompt=Prompt(id="p", text="p"), group_size=len(outputs), seed=0, stream=0, index=0
    )
    return RolloutGroup(
        request=request,
        outputs=outputs,
        payload=None,
        mask=torch.tensor(mask, dtype=torch.bool),
        everything=None if everything is None else torch.tensor(everything, dtype=torch.bool),
        truncated=None if truncated is None else torch.tensor(truncated),
    )


def test_length_counts_what_was_drawn_and_nothing_is_cut_off_unless_said():
    rolled = group(["a", "b"], [[1, 0], [0, 0]], everything=[[1, 0], [1, 1]])
    found = facts.of_group(rolled, frozenset({"length", "truncated"}), [])
    assert found.keys() == {"length", "truncated"}
    assert found["length"].tolist() == [1, 2]
    assert found["length"].dtype == torch.int64
    assert found["truncated"].tolist() == [False, False]
    cut = group(["a", "b"], [[1], [1]], truncated=[False, True])
    found = facts.of_group(cut, frozenset({"truncated"}), [])
    assert found["truncated"].tolist() == [False, True]
    with pytest.raises(ValueError, match="truncated has 1 values"):
        group(["a", "b"], [[1], [1]], truncated=[True])


def test_answers_are_those_of_the_first_reward_that_reads_some():
    specs = parse_specs(
        [{"name": "length"}, {"name": "exact_match", "where": "boxed", "weight": 0}]
    )
    outputs = ["so \\boxed{1,000}", "\\boxed{1e3}", "\\boxed{ Two  Words }", "none"]
    found = facts.of_group(group(outputs, [[1]] * 4), frozenset({"answer"}), specs)
    assert found["answer"] == ["1000", "1000", "two words", None]
    with pytest.raises(UserError, match=r"answers of samples: .* not list"):
        facts.of_group(group([[1.0]], [[1]]), frozenset({"answer"}), specs)


def test_features_are_near_for_what_is_alike():
    first, again, other = (
        facts.features(text) for text in ("the red square", "The red  squares", "12 + 30 = 42")
    )
    assert first.norm().item() == pytest.approx(1)
    assert first @ again > 0.8 > 0.2 > first @ other
    assert facts.features("").norm() <= 1
    red, blue = (facts.features(Image.new("RGB", (32, 32), c)) for c in ("red", "blue"))
    assert red.shape == (192,)
    assert red @ red == pytest.approx(1)
    assert red @ blue < 0.5
    assert facts.features([3.0, 4.0]).tolist() == [0.6, 0.8]
    with pytest.raises(UserError, match="samples of type dict have no features; allowed: texts"):
        facts.features({"a": 1})


def test_facts_of_groups_are_joined_in_order():
    parts = [
        {"length": torch.tensor([1, 2]), "answer": ["a", None]},
        {"length": torch.tensor([3]), "answer": ["b"]},
    ]
    joined = facts.joined(parts)
    assert joined["length"].tolist() == [1, 2, 3]
    assert joined["answer"] == ["a", None, "b"]


def test_scores_check_their_facts():
    some = {
        "combined": torch.zeros(2).double(),
        "group": torch.zeros(2, dtype=torch.int64),
        "valid": torch.ones(2, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match="3 values of answer for 2 samples"):
        Scores(**some, answer=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"length is torch\.float32"):
        Scores(**some, length=torch.zeros(2))
    with pytest.raises(ValueError, match="features has rank 1"):
        Scores(**some, features=torch.zeros(2).double())
    assert Scores(**some, answer=["a", None]).need("answer") == ["a", None]
    with pytest.raises(ValueError, match="nobody found out 'length'"):
        Scores(**some).need("length")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["advantage=copo_consistency"], "advantage: 'copo_consistency' compares answers, and no"),
        (
            ["advantage=copo_consistency", "backend.draws_texts=false"],
            "advantage: 'copo_consistency' compares answers, which stand in texts; backend 'toy.ga",
        ),
        (["advantage={name: subpo, function: distinct}"], "{name: exact_match, where: boxed"),
        (
            ["advantage={name: optimal_baseline, weight: logits}"],
            "advantage: 'optimal_baseline' needs sum_squares, which backend",
        ),
        (
            ["modulators=[{name: clip}, {name: adora, reward: neer}]"],
            r"modulators\[1\].reward: no reward 'neer'; did you mean 'near'",
        ),
        (
            ["modulators=[{name: toy.recentres}, {name: adora}]"],
            r"modulators\[0\]: 'toy.recentres' gives advantages mean 0, which 'adora' after it",
        ),
        (
            ["advantage={name: riskpo, bundle_size: 2}", "training.refills=1"],
            "refills: 1 leaves out groups .* from which advantage 'riskpo' learns",
        ),
        (
            ["advantage=gp_loo", "training.refills=1"],
            "refills: 1 leaves out groups .* from which advantage 'gp_loo' learns",
        ),
        (["advantage={name: riskpo}"], "bundle_size: 5 does not divide the 4 prompts"),
        (
            ["advantage={name: risk, measure: pass_at_k, k: 6}"],
            "advantage.k: 6 draws are more than the 5 samples",
        ),
        (
            ["advantage={name: risk, measure: pass_at_k, k: 5}", "prompts.budget=knapsack"],
            "advantage.k: 5 draws are more than the 2 samples of the smallest group",
        ),
        (
            ["advantage={name: riskpo, bundle_size: 2}", "objective=gbpo"],
            "advantage: 'riskpo' judges samples .* so does objective 'gbpo'; .*: group, leave",
        ),
        (["advantage=bnpo", "objective=real"], "advantage: 'bnpo' judges .* 'real'; allowed"),
        (
            ["advantage=gp_loo", "objective=p3o_pairwise"],
            "advantage: 'gp_loo' judges .*objective 'p3o_pairwise'; allowed with it: .*none",
        ),
        (
            [
                "advantage={name: copo_consistency, threshold: 1.7}",
                "rewards=[{name: exact_match, target: target}]",
            ],
            r"threshold: 1.7 is not below log\(5\) = 1.61",
        ),
        (["advantage={name: bnpo}", "training.group_size=1"], "too small for advantage 'bnpo'"),
        (
            ["advantage={name: gdpo_decoupled, only_if: {near: {reward: far, least: 1}}}"],
            "advantage.only_if: no reward 'far'",
        ),
        (
            ["advantage={name: gdpo_decoupled}", "kl_in_reward={coef: 0.1}"],
            "kl_in_reward: advantage 'gdpo_decoupled' normalises each reward by itself",
        ),
    ],
)
def test_what_is_refused_before_training(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        refuse_unless_consistent(parse(apply_overrides(toy_config(tmp_path), overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["modulators=[{name: adora}, {name: toy.recentres}]"],
        ["advantage={name: copo_consistency}", "rewards=[{name: exact_match, target: target}]"],
        ["advantage={name: bnpo}", "kl_in_reward={coef: 0.1}"],
        ["advantage={name: risk, measure: pass_at_k, k: 5}"],
        list(READS_FACTS),
        list(READS_FEATURES),
        list(KEEPS_STATE),
    ],
)
def test_what_is_not_refused(tmp_path, overrides):
    refuse_unless_consistent(parse(apply_overrides(toy_config(tmp_path), overrides)))


def test_a_recentring_modulator_may_stand_before_the_one_that_makes_probabilities(tmp_path):
    data = toy_config(tmp_path) | {"objective": {"name": "nft"}}
    data["modulators"] = [{"name": "toy.recentres"}, {"name": "optimality"}]
    terms = ["logp", "logp_ref", "implicit_positive", "implicit_negative"]
    data["backend"] = {"name": "toy.gauss", "terms": terms}
    refuse_unless_consistent(parse(data))


def test_rewards_that_are_no_successes_end_a_run_of_bnpo(toy):
    with pytest.raises(UserError, match=r"'bnpo' reads rewards as successes, and one is -"):
        toy("advantage=bnpo")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(READS_FACTS, id="facts"),
        pytest.param(READS_FEATURES, id="features", marks=pytest.mark.slow),
    ],
)
def test_two_processes_find_the_same_facts(tmp_path, toy, options):
    one = toy(*options, folder=made(tmp_path / "one"))
    assert_same_trajectory(one, launch(tmp_path / "two", torchrun(2), *options))


def test_facts_reach_the_estimator(toy):
    run = toy(*READS_FACTS)
    weights = [line["adora/weight"] for line in metrics_of(run) if "adora/weight" in line]
    assert len(weights) == 6
    # All samples have the same length, so no right answer is longer than a wrong one: a prompt has
    # the weight 1 only where none is wrong.
    assert all(0.1 - 1e-9 <= weight <= 1 for weight in weights)
