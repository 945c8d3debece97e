"""Reward functions of TRL, verl and EasyR1, used as they are."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from PIL import Image

from mmrl.errors import UserError
from mmrl.schema import validate
from mmrl.targets import notes, refuse_missing_columns
from mmrl.types import Moment, Prompt
from rewards import python
from rewards.combine import Scorer, parse_specs, scored

pytestmark = pytest.mark.usefixtures("theirs")


# --- what users bring ---------------------------------------------------------------------------


def trl_accuracy(prompts, completions, answer, **kwargs):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer, strict=True)]


def trl_chat(completions, log_extra=None, log_metric=None, **kwargs):
    log_metric("seen", len(completions))
    log_metric("seen", torch.tensor(0.0))
    log_extra("roles", [completion[0]["role"] for completion in completions])
    return [float(len(completion[0]["content"])) for completion in completions]


def trl_strict(prompts, completions, completion_ids, trainer_state):
    assert trainer_state is None, "of no run"
    assert completion_ids is None, "nor of a rollout"
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]


def trl_reads_ids(completions, completion_ids, trainer_state, **kwargs):
    assert isinstance(completion_ids, list)
    left = trainer_state.max_steps - trainer_state.global_step
    found = [float(left * sum(ids)) for ids in completion_ids]
    completion_ids.clear()
    return found


def trl_pictures(completions, completion_ids, **kwargs):
    assert completion_ids is None
    return [1.0] * len(completions)


def trl_logs_words(completions, log_metric, **kwargs):
    log_metric("seen", "many")
    return [1.0] * len(completions)


async def trl_slow(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [2.0] * len(completions)


def trl_short(completions, **kwargs):
    return [1.0]


def trl_number(completions, **kwargs):
    return 1.0


def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    assert isinstance(extra_info, dict)
    return scale * float(solution_str == ground_truth) + (data_source == "bonus")


def score_as_dict(solution_str, ground_truth):
    return {"score": None if solution_str == "?" else 1.0, "acc": 1.0}


def score_without_score(solution_str, **kwargs):
    return {"acc": 1.0}


async def score_by_network(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(float(solution_str))
    return 1.0


def score_slowly(solution_str, **kwargs):
    time.sleep(float(solution_str))
    return 1.0


def score_failing(solution_str, **kwargs):
    raise RuntimeError("no judge")


def overall(reward_input, weight=1.0):
    right = reward_input["response"] == reward_input["ground_truth"]
    return {"overall": weight * right, "length": reward_input["response_length"]}


def overall_lengths(reward_inputs):
    return [{"overall": r["response_length"]} for r in reward_inputs]


def overall_short(reward_inputs):
    return [{"overall": 1.0}]


async def plain(prompts, outputs, **columns):
    return [3.0] * len(outputs)


@pytest.fixture
def theirs(monkeypatch):
    """The functions above as modules ``theirs`` and ``theirs_batch`` (EasyR1's constant)."""
    own = {n: v for n, v in globals().items() if callable(v) and getattr(v, "__code__", None)}
    module, batch = ModuleType("theirs"), ModuleType("theirs_batch")
    module.__dict__.update(own)
    batch.__dict__.update(own, REWARD_TYPE="batch")
    monkeypatch.setitem(sys.modules, "theirs", module)
    monkeypatch.setitem(sys.modules, "theirs_batch", batch)


def build(function, signature, **config):
    config = {"function": f"theirs.{function}", "signature": signature, **config}
    return python.build(validate(python.Config, config, "rewards[0]"))


def missing(values):
    return [math.isnan(value) for value in values]


# --- TRL ----------------------------------------------------------------------------------------


def test_trl():
    reward = build("trl_accuracy", "trl")
    found = reward(["p"] * 3, ["a", "b", "c"], answer=["a", "a", None], other=[1, 2, 3])
    assert found[:2] == [1, 0]
    assert missing(found) == [False, False, True]


def test_trl_without_room_for_columns():
    assert build("trl_strict", "trl")(["pp"], ["ccc"], other=[1]) == [5]


def test_trl_coroutine():
    assert build("trl_slow", "trl")(["p"] * 2, ["a", "b"]) == [2, 2]


def test_trl_gets_messages_where_the_prompt_has_them(group):
    rolled = group(["a", "bcd"])
    messages = ({"role": "system", "content": "s"}, {"role": "user", "content": "p"})
    prompt = replace(rolled.request.prompt, messages=messages)
    rolled = replace(rolled, request=replace(rolled.request, prompt=prompt))
    found = scored(build("trl_chat", "trl"), rolled, "r")
    assert found.values.tolist() == [1, 3]
    assert found.logged == (("seen", 2.0), ("seen", 0.0))


def test_trl_gets_token_ids_and_the_state_of_the_run(group):
    rolled = group(["a", "bcd"])
    moment = Moment(step=3, num_steps=10, seed=0)
    request = replace(rolled.request, moment=moment)
    rolled = replace(rolled, request=request, tokens=[[5], [1, 2, 3]])
    reward = build("trl_reads_ids", "trl")
    assert scored(reward, rolled, "r").values.tolist() == [35, 42]
    assert scored(reward, rolled, "r").values.tolist() == [35, 42], "what it gets is its own"


def test_trl_gets_no_token_ids_of_pictures(group):
    rolled = group([Image.new("L", (1, 1))])
    assert scored(build("trl_pictures", "trl"), rolled, "r").values.tolist() == [1]


def test_a_metric_that_is_no_number_is_a_failure(group):
    found = scored(build("trl_logs_words", "trl"), group(["a"]), "r")
    assert "could not convert string to float: 'many'" in found.message
    assert found.logged == ()


@pytest.mark.parametrize(
    ("function", "signature", "config"),
    [("trl_short", "trl", {}), ("overall_short", "easyr1", {"batched": True})],
)
def test_a_wrong_number_of_values_names_both(group, function, signature, config):
    reward = build(function, signature, **config)
    outcome = scored(reward, group(["a", "b"], ground_truth="a"), "r")
    assert "1 values for 2 samples" in str(outcome.fatal)


def test_no_list_is_refused(group):
    assert "not [2]" in str(scored(build("trl_number", "trl"), group(["a", "b"]), "r").fatal)


# --- verl ---------------------------------------------------------------------------------------


def test_verl():
    reward = build("compute_score", "verl", kwargs={"scale": 2.0})
    columns = {"data_source": ["x", "bonus", "x"], "extra_info": [{}, {"i": 1}, {}]}
    found = reward(["p"] * 3, ["a", "b", "c"], ground_truth=["a", "a", None], **columns)
    assert found[:2] == [2, 1]
    assert missing(found) == [False, False, True]


def test_verl_finds_the_truth_in_reward_model():
    models = [{"style": "rule", "ground_truth": "a"}, {"style": "model"}, None]
    found = build("compute_score", "verl")(["p"] * 3, ["a"] * 3, reward_model=models)
    assert found[0] == 1
    assert missing(found) == [False, True, True]
    found = build("compute_score", "verl", target="answer")(["p"], ["a"], answer=["a"])
    assert found == [1]


def test_verl_dicts():
    found = build("score_as_dict", "verl")(["p"] * 2, ["a", "?"], ground_truth=["a", "a"])
    assert found[0] == 1
    assert missing(found) == [False, True]
    with pytest.raises(TypeError, match=r"a dict without 'score': \['acc'\]"):
        build("score_without_score", "verl")(["p"], ["a"], ground_truth=["a"])


def test_coroutines_run_side_by_side():
    start = time.perf_counter()
    found = build("score_by_network", "verl")(["p"] * 9, ["0.3"] * 9, ground_truth=["a"] * 9)
    assert found == [1] * 9
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize("function", ["score_by_network", "score_slowly"])
def test_a_late_sample_is_not_scored(function):
    reward = build(function, "verl", sample_timeout_s=0.3)
    found = reward(["p"] * 3, ["0", "5", "0"], ground_truth=["a"] * 3)
    assert missing(found.values) == [False, True, False]
    assert (found.num_failed, found.message) == (1, "timed out after 0.3 s")
    with pytest.raises(TimeoutError, match=r"all 2 samples took longer than 0\.3 s"):
        reward(["p"] * 2, ["5", "5"], ground_truth=["a"] * 2)


@pytest.mark.parametrize("config", [{}, {"sample_timeout_s": 5}])
def test_what_a_function_raises_is_kept(config):
    with pytest.raises(RuntimeError, match="no judge"):
        build("score_failing", "verl", **config)(["p"], ["a"], ground_truth=["a"])


# --- EasyR1 -------------------------------------------------------------------------------------


def test_easyr1():
    reward = build("overall", "easyr1", kwargs={"weight": 3.0})
    found = reward(["p"] * 3, ["a", "b", "c"], ground_truth=["a", "a", ""])
    assert found[:2] == [3, 0]
    assert missing(found) == [False, False, True]


@pytest.mark.parametrize("batched", [True, None])
def test_easyr1_in_batches(monkeypatch, batched):
    monkeypatch.setattr(overall_lengths, "__module__", "theirs_batch")
    reward = build("overall_lengths", "easyr1", batched=batched, target="answer")
    found = reward(["p"] * 3, ["a b", "c", "d"], answer=["x", None, "y"])
    assert found[0] == 2
    assert found[2] == 1
    assert missing(found) == [False, True, False]


def test_easyr1_lengths_are_decisions_of_the_rollout(group):
    reward = build("overall_lengths", "easyr1", batched=True)
    outcome = scored(reward, group(["a b c", "d"], ground_truth="x"), "r")
    assert outcome.values.tolist() == [1, 1]
    rolled = group(["a b c", "d"], ground_truth="x")
    dropped = replace(rolled, mask=torch.zeros(2, 1).bool(), everything=rolled.mask)
    assert scored(reward, dropped, "r").values.tolist() == [1, 1], "trained or not"


# --- all ----------------------------------------------------------------------------------------


def test_coroutines_with_our_own_signature():
    assert build("plain", "mmrl")(["p"] * 2, ["a", "b"]) == [3, 3]


def test_prompts_without_a_ground_truth_are_known_before_training():
    def prompts(*columns):
        return [Prompt(id="", text="p", columns=c, where=f"a:{i}") for i, c in enumerate(columns)]

    entry = {"name": "theirs.compute_score", "signature": "verl"}
    specs = parse_specs([entry])
    nested = {"reward_model": {"ground_truth": "a"}}
    refuse_missing_columns(specs, prompts(nested, {}), "rewards")
    (note,) = notes(specs, prompts(nested, {}, {"ground_truth": ""}), "rewards")
    assert "'ground_truth' is empty or missing in 2 of 3 prompts" in note
    assert note.endswith("first in a:1: prompt 'p'")
    with pytest.raises(UserError, match=r"'ground_truth', which no prompt has; .*truth"):
        refuse_missing_columns(specs, prompts({"truth": "a"}), "rewards")
    specs = parse_specs([entry | {"target": "answer"}])
    with pytest.raises(UserError, match=r"'answer', which is empty in each of its 2 .* a:0: "):
        refuse_missing_columns(specs, prompts({"answer": ""}, {}), "rewards")
    trl = parse_specs([{"name": "theirs.trl_slow", "signature": "trl"}])
    assert notes(trl, prompts({}), "rewards") == []


def test_in_a_scorer(group):
    specs = parse_specs(
        [
            {"name": "theirs.compute_score", "label": "v", "signature": "verl"},
            {"name": "theirs.trl_slow", "label": "t", "signature": "trl", "weight": 0.5},
        ]
    )
    assert parse_specs([specs[0].dump()]) == specs[:1]
    with Scorer(specs) as scorer:
        scorer.submit(group(["a", "b"], ground_truth="a"))
        (result,) = scorer.collect()
    assert result.combined.tolist() == [2, 1]
    assert not result.failures


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"signature": "ver"}, r"rewards\[0\]\.signature: .*'verl' or 'easyr1' .*got 'ver'"),
        ({"signature": "trl", "sample_timeout_s": 1}, "signature: verl or easyr1, not 'trl'"),
        ({"batched": True}, "batched is for signature: easyr1, not 'mmrl'"),
        ({"signature": "easyr1", "batched": True, "sample_timeout_s": 1}, "one call"),
    ],
)
def test_options_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        validate(python.Config, {"function": "theirs.overall", **config}, "rewards[0]")


@pytest.mark.parametrize(
    ("function", "signature", "config", "message"),
    [
        ("overall", "verl", {}, r"no argument 'solution_str'; signature is 'verl', allowed: mmrl,"),
        ("compute_score", "trl", {}, "no argument 'completions'"),
        ("trl_strict", "easyr1", {}, "missing a required argument"),
        ("compute_score", "verl", {"kwargs": {"scael": 1}}, "unexpected keyword argument 'scael'"),
        ("compute_score", "mmrl", {"kwargs": {"scael": 1}}, "unexpected keyword argument 'scael'"),
    ],
)
def test_functions_that_do_not_fit(function, signature, config, message):
    with pytest.raises(UserError, match=f"theirs.{function}.* cannot be called .*{message}"):
        build(function, signature, **config)


def test_a_time_for_each_of_a_batch(monkeypatch):
    monkeypatch.setattr(overall_lengths, "__module__", "theirs_batch")
    with pytest.raises(UserError, match="takes all samples at once"):
        build("overall_lengths", "easyr1", sample_timeout_s=1)
