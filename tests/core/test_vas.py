"""Variance-aware sampling: scores, draws, and what is remembered."""

from __future__ import annotations

import json
import math

import pytest
import torch
from pydantic import ValidationError

from mmrl.errors import UserError
from mmrl.prompts import vas
from mmrl.prompts.vas import Config, distinct, learn, measure, self_bleu, take
from mmrl.rollouts import make_requests
from mmrl.types import Outcome, Prompt, RolloutGroup, RolloutRequest

PROMPTS = [Prompt(id=f"p{i}", text=f"prompt {i}") for i in range(10)]
VARIANCE = Config(alpha=1.0, beta=0.0)


def outcome(prompt_id, rewards, measure=0.0, **by_name):
    values = torch.tensor(rewards, dtype=torch.float64)
    named = {name: torch.tensor(value, dtype=torch.float64) for name, value in by_name.items()}
    return Outcome(
        prompt_id=prompt_id,
        combined=values.nan_to_num(),
        valid=values.isfinite(),
        by_name=named,
        measure=measure,
    )


def group(texts, prompt=PROMPTS[0]):
    return RolloutGroup(
        request=RolloutRequest(prompt=prompt, group_size=len(texts), seed=0, stream=0, index=0),
        outputs=texts,
        payload=None,
        mask=torch.ones(len(texts), 1).bool(),
    )


def score(rewards, **options):
    return learn([outcome("p", rewards)], Config(alpha=1.0, beta=0.0, **options), {})["scores"]["p"]


# Scores


@pytest.mark.parametrize("successes", range(9))
def test_1_the_variance_of_successes_is_p_times_1_minus_p(successes):
    rewards = [1.0] * successes + [0.0] * (8 - successes)
    found, p = score(rewards), successes / 8
    assert found == pytest.approx(p * (1 - p), abs=1e-12)
    assert 0 <= found <= 0.25
    assert found == pytest.approx(score([1 - r for r in rewards]), abs=1e-12)
    assert found <= score([1.0] * 4 + [0.0] * 4)


def test_4_scores_depend_neither_on_order_nor_on_white_space_at_the_end():
    texts = ["a b c d", "a b x", "c c c"]
    for kind in ("distinct", "self_bleu"):
        config = Config(diversity=kind)
        expected = measure(group(texts), config)
        assert measure(group([f"{text}   \n" for text in texts]), config) == expected
        assert measure(group(texts[::-1]), config) == pytest.approx(expected, abs=1e-12)


def test_5_equal_samples_are_least_diverse_and_different_ones_most():
    equal, different = ["a b c d"] * 4, ["a b c", "d e f", "g h i", "j k l"]
    between = ["a b c d", "a b c d", "a b c x", "e f g h"]
    for kind, least in (("distinct", 0.25), ("self_bleu", 0.0)):
        config = Config(diversity=kind, ngram=3)
        found = [measure(group(texts), config) for texts in (equal, between, different)]
        assert found[0] == pytest.approx(least, abs=1e-12)
        assert found[2] == 1.0
        assert found[0] < found[1] < found[2]


def test_distinct_by_hand():
    assert distinct([["a", "b", "a"], ["b", "a"]], 2) == 2 / 3  # ab, ba | ba
    assert distinct([["a"], ["a"]], 3) == 0.5
    assert distinct([[], []], 3) == 0.0


def test_self_bleu_by_hand():
    # Each has 2 of its 3 words, and 1 of its 2 pairs, in the other.
    samples = [["a", "b", "c"], ["a", "b", "d"]]
    assert self_bleu(samples, 2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # A short one pays for its brevity: exp(1 - 4 / 2).
    short = [["a", "b"], ["a", "b", "c", "d"]]
    longer = math.sqrt(2 / 4 * 1 / 3)
    assert self_bleu(short, 2) == pytest.approx((math.exp(-1) + longer) / 2)
    assert self_bleu([["a"]], 3) == 0.0
    assert self_bleu([[], ["a"]], 3) == 0.0


def test_6_the_variance_is_that_within_prefixes_and_that_between_them():
    """Law of total variance for two equally likely prefixes with success 0.9 and 0.2."""
    counts = {0.9: (9, 10), 0.2: (2, 10)}
    rewards = [float(i < k) for k, n in counts.values() for i in range(n)]
    within = sum(p * (1 - p) for p in counts) / 2
    mean = sum(counts) / 2
    between = sum((p - mean) ** 2 for p in counts) / 2
    assert score(rewards) == pytest.approx(within + between, abs=1e-12)


def test_alpha_and_beta_weigh_variance_and_diversity():
    config = Config(alpha=0.5, beta=2.0)
    found = learn([outcome("p", [0.0, 1.0], measure=0.7)], config, {})
    assert found["scores"]["p"] == pytest.approx(0.5 * 0.25 + 2.0 * 0.7)


def test_momentum_keeps_a_share_of_the_old_score():
    state = {"scores": {"p": 0.2}}
    config = Config(alpha=1.0, beta=0.0, momentum=0.75)
    found = learn([outcome("p", [0.0, 0.0]), outcome("q", [0.0, 1.0])], config, state)
    assert found["scores"] == pytest.approx({"p": 0.15, "q": 0.25}), "a first score has no old one"
    assert state == {"scores": {"p": 0.2}}, "the state that came in is left alone"


def test_groups_of_one_prompt_are_taken_together_and_failures_left_out():
    both = [outcome("p", [1.0, 1.0]), outcome("p", [0.0, 0.0, math.nan])]
    assert learn(both, VARIANCE, {})["scores"] == {"p": 0.25}
    assert learn([outcome("p", [1.0, math.nan])], VARIANCE, {"scores": {"p": 0.1}})["scores"] == {
        "p": 0.1
    }


def test_a_reward_may_be_named():
    config = Config(alpha=1.0, beta=0.0, reward="right")
    rolled = outcome("p", [0.5, 0.5], right=[0.0, 1.0], format=[1.0, 1.0])
    assert learn([rolled], config, {})["scores"] == {"p": 0.25}
    with pytest.raises(UserError, match="no reward has the label 'wrong'"):
        learn([rolled], Config(reward="wrong"), {})


def test_pictures_have_no_words():
    with pytest.raises(UserError, match=r"beta = 0\.2 weighs the diversity of texts"):
        measure(group([object(), object()]), Config())
    assert measure(group([object(), object()]), VARIANCE) == 0.0


# Draws


def drawn(config, scores, count=1000, step=0, taken=0, prompts=PROMPTS):
    chosen, state = take(prompts, count, step, 7, config, {"scores": scores, "taken": taken})
    return [prompt.id for prompt in chosen], state


@pytest.mark.parametrize("share", [0.0, 0.25, 0.55, 1.0])
def test_2_a_step_has_as_many_weighted_draws_as_asked_for(share):
    ids, state = drawn(
        Config(weighted_share=share), {p.id: float(p.id == "p3") for p in PROMPTS}, 9
    )
    weighted = math.floor(share * 9)
    assert ids[:weighted] == ["p3"] * weighted
    assert len(ids) == 9
    assert state["taken"] == 9 - weighted


def test_3_weighted_draws_are_in_proportion_to_the_scores():
    scores = {p.id: float(i) for i, p in enumerate(PROMPTS)}
    ids, _ = drawn(Config(weighted_share=1.0), scores, 100_000)
    counts = torch.tensor([ids.count(p.id) for p in PROMPTS], dtype=torch.float64)
    expected = torch.arange(10).double() / 45 * 100_000
    assert counts[0] == 0
    chi_square = ((counts - expected)[1:] ** 2 / expected[1:]).sum()
    assert float(chi_square) < 26.1, "99.9 % of draws with 8 degrees of freedom are below"


def test_3_prompts_without_weight_come_in_the_uniform_half_only():
    scores = {p.id: float(p.id == "p3") for p in PROMPTS}
    ids, _ = drawn(Config(weighted_share=0.5), scores, 20)
    assert ids[:10] == ["p3"] * 10
    assert sorted(ids[10:]) == sorted(p.id for p in PROMPTS)


@pytest.mark.parametrize("scores", [{}, {p.id: 0.0 for p in PROMPTS}, {p.id: 0.3 for p in PROMPTS}])
def test_7_equal_scores_make_it_uniform(scores):
    ids, _ = drawn(Config(weighted_share=1.0), scores, 20_000)
    # Five deviations of 2000 +- sqrt(20000 x 0.1 x 0.9).
    assert all(abs(ids.count(p.id) - 2000) < 5 * 43 for p in PROMPTS)


def test_prompts_without_a_score_count_as_the_mean_of_the_others():
    scores = {"p0": 1.0, "p1": 3.0}
    ids, _ = drawn(Config(weighted_share=1.0), scores, 20_000)
    total = 1 + 3 + 8 * 2
    for name, weight in (("p0", 1), ("p1", 3), ("p5", 2)):
        assert ids.count(name) / 20_000 == pytest.approx(weight / total, abs=0.01)


def test_the_uniform_part_leaves_no_prompt_out():
    config, state, seen = Config(weighted_share=0.0), {}, []
    for step in range(10):
        chosen, state = take(PROMPTS, 7, step, 7, config, state)
        seen += [prompt.id for prompt in chosen]
    assert all(seen.count(p.id) == 7 for p in PROMPTS), "70 draws, 7 passes"
    passes = [seen[i : i + 10] for i in range(0, 70, 10)]
    assert all(sorted(each) == sorted(p.id for p in PROMPTS) for each in passes)
    assert len({tuple(each) for each in passes}) == 7, "each pass in another order"


def test_8_draws_follow_from_seed_step_and_state_and_the_state_from_a_file():
    state = {"scores": {p.id: 0.1 * i for i, p in enumerate(PROMPTS)}, "taken": 3}
    config = Config()
    first = take(PROMPTS, 8, 5, 1, config, state)
    again = take(PROMPTS, 8, 5, 1, config, json.loads(json.dumps(state)))
    assert first == again
    assert take(PROMPTS, 8, 6, 1, config, state)[0] != first[0]
    assert take(PROMPTS, 8, 5, 2, config, state)[0] != first[0]


def test_9_more_weight_gives_more_variance():
    """80 % of the prompts are solved; the mean of P (1 - P) over draws rises with the share."""
    prompts = [Prompt(id=str(i), text=str(i)) for i in range(100)]
    scores = {p.id: 0.0 if i < 80 else 0.01 * (i - 79) for i, p in enumerate(prompts)}
    means = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        ids, _ = drawn(Config(weighted_share=share), scores, 2000, prompts=prompts)
        means.append(sum(scores[i] for i in ids) / 2000)
    assert means == sorted(means)
    assert means[0] == pytest.approx(sum(scores.values()) / 100)
    assert means[-1] > 5 * means[0]


def test_a_prompt_that_comes_twice_in_a_step_has_other_samples():
    requests = make_requests([PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[1]], 4, 0, 0)
    assert [request.first_sample for request in requests] == [0, 0, 4, 8]


@pytest.mark.parametrize(("every", "due"), [(None, []), (1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6])])
def test_when_a_pass_over_all_prompts_is_due(every, due):
    config = Config(refresh_every=every, refresh_samples=4)
    assert [step for step in range(7) if vas.refresh_samples(step, config) == 4] == due


@pytest.mark.parametrize(
    "options", [{"weighted_share": 1.1}, {"momentum": 1.0}, {"alpha": -1}, {"diversity": "bleu"}]
)
def test_options_out_of_range(options):
    with pytest.raises(ValidationError):
        Config(**options)


def test_what_is_logged():
    assert vas.metrics({}) == {}
    found = vas.metrics({"scores": {"a": 0.0, "b": 0.2}})
    assert found == {"sampler/mean_score": pytest.approx(0.1), "sampler/zero_scores": 0.5}
