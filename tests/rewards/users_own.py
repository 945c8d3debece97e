"""Reward functions that a process of its own can import: some answer, some do not."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time


def behave(word: str) -> float:
    """What a completion asks for."""
    if word == "hang":
        time.sleep(600)
    if word == "crash":
        os._exit(7)
    if word == "leave":
        sys.exit("enough")
    if word == "raise":
        raise ValueError("no judge")
    if word == "print":
        print("not an answer")
    return float(len(word))


def mmrl(prompts, outputs, *, factor=1.0, **columns):
    return [factor * behave(output) for output in outputs]


def trl(completions, answer, log_metric=None, **kwargs):
    log_metric("seen", 1)
    words = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [None if a is None else behave(w) for w, a in zip(words, answer, strict=True)]


def trl_tokens(completions, completion_ids, trainer_state, log_metric, **kwargs):
    log_metric("tokens", len(completion_ids[0]))
    if completions[0] == "raise":
        raise ValueError("no judge")
    return [float(trainer_state.global_step + len(ids)) for ids in completion_ids]


def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": behave(solution_str)}


def easyr1(reward_inputs):
    return [{"overall": r["response_length"]} for r in reward_inputs]


async def network(prompts, outputs, **columns):
    await asyncio.sleep(float(outputs[0]))
    return [1.0]


def process(prompts, outputs, **columns):
    """The id of the process, or how many sleepers of its own are left."""
    if outputs[0] == "hang":
        subprocess.run(["sleep", "613"], check=False)
    return [float(os.getpid())]


def two(prompts, outputs, **columns):
    return [1.0, 2.0]


def array(prompts, outputs, **columns):
    import numpy as np

    return np.array([len(output) for output in outputs])


def word(prompts, outputs, **columns):
    return ["good"]


def width(prompts, outputs, **columns):
    return [float(output.width) for output in outputs]
