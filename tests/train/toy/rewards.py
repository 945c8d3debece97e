"""Rewards for the toy backend: outputs are lists of K numbers."""

import os
import signal
import time

import torch


def near_target(prompts, outputs, target, **columns):
    """Minus the squared distance to the prompt's target."""
    x, goal = torch.tensor(outputs), torch.tensor(target)
    return -((x - goal[:, None]) ** 2).sum(1)


def raises(prompts, outputs, **columns):
    raise RuntimeError("the reward server is down")


def always_nan(prompts, outputs, **columns):
    return [float("nan")] * len(outputs)


def nan_on_first(prompts, outputs, target, **columns):
    if prompts[0].endswith("0"):
        return always_nan(prompts, outputs)
    return near_target(prompts, outputs, target)


def one_too_many(prompts, outputs, **columns):
    return [0.0] * (len(outputs) + 1)


def hangs_on_first(prompts, outputs, target, **columns):
    if prompts[0].endswith("0"):
        time.sleep(60)
    return near_target(prompts, outputs, target)


def fails_on_first(prompts, outputs, target, **columns):
    if prompts[0].endswith("0"):
        raise RuntimeError("no answer")
    return near_target(prompts, outputs, target)


def slow(prompts, outputs, target, **columns):
    time.sleep(0.03)
    return near_target(prompts, outputs, target)


def constant(prompts, outputs, **columns):
    return [1.0] * len(outputs)


def trl_tokens(completions, completion_ids, trainer_state, log_metric, path, **columns):
    """In TRL's way: the length in tokens, which must be those of the completion."""
    from transformers import AutoTokenizer

    decode = AutoTokenizer.from_pretrained(path).decode
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    assert [decode(ids, skip_special_tokens=True) for ids in completion_ids] == texts
    lengths = [float(len(ids)) for ids in completion_ids]
    log_metric("mean", sum(lengths) / len(lengths))
    log_metric("step", trainer_state.global_step)
    log_metric("steps", trainer_state.max_steps)
    return lengths


CALLS = 0


def kills_itself(prompts, outputs, target, **columns):
    """SIGKILL in the middle of a run, once: a marker file says that it has happened."""
    global CALLS
    CALLS += 1
    marker = os.environ.get("TOY_KILL_MARKER")
    if marker and CALLS == int(os.environ["TOY_KILL_CALL"]) and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return near_target(prompts, outputs, target)


def ocr_that_kills(prompts, outputs, **columns):
    """The shipped OCR reward, with a SIGKILL on the way."""
    from rewards import ocr

    kills_itself(prompts, torch.zeros(len(outputs), 1), torch.zeros(len(outputs)))
    return ocr.build(ocr.Config())(prompts, outputs, **columns)


def says_red(prompts, outputs, **columns):
    """The share of words that are "red"."""
    return [sum(w == "red" for w in text.split()) / max(1, len(text.split())) for text in outputs]


def early_words(prompts, outputs, **columns):
    """The share of words that begin with a letter up to m."""
    return [sum(w < "n" for w in text.split()) / max(1, len(text.split())) for text in outputs]


def likeness(prompts, outputs, target, **columns):
    """Between 0 and 1."""
    return near_target(prompts, outputs, target).exp()
