"""Training on completions that the data set shows, in place of the policy's own samples.

A backend whose ``Config`` has ``demonstrations``, the name of a column, takes the completion of
each training prompt from there.  Whatever compares samples of the policy with each other, or weighs
them by their ratio, would be wrong about them: a part says by ``TAKES_DEMONSTRATIONS`` that it is
not.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmrl.config import Part, RunConfig
from mmrl.errors import UserError


def column_of(config: RunConfig) -> str | None:
    """Where training prompts have their demonstrations; ``None``: the policy samples."""
    return getattr(config.backend.config, "demonstrations", None)


def keys_of(config: RunConfig) -> dict[str, str]:
    """``prompts.keys``, by which loading refuses a row that has no demonstration."""
    column = column_of(config)
    return ({} if column is None else {column: column}) | config.prompts.keys


def refuse_misused(config: RunConfig) -> None:
    """``UserError`` for what cannot be done with demonstrations, or only with samples."""
    column, training = column_of(config), config.training
    if column is None:
        if not config.rewards:
            raise UserError(
                "rewards: [] is empty; allowed: at least 1, or none with "
                "backend.rollout.demonstrations, where nothing is sampled"
            )
        return
    who = f"backend.rollout.demonstrations: {column!r}"
    if training.group_size != 1 or config.prompts.budget is not None:
        raise UserError(
            f"{who} gives a prompt one completion, but training.group_size is "
            f"{training.group_size} or there is a prompts.budget; allowed: 1, without a budget "
            "(another completion of a prompt is another row)"
        )
    absent = {
        "training.refills": bool(training.refills),
        "training.stale": training.stale is not None,
        "kl_in_reward": config.kl_in_reward is not None,
        f"prompts.sampler: {config.prompts.sampler.name!r}": hasattr(
            config.prompts.sampler.module, "learn"
        ),
    }
    for key, asked in absent.items():
        if asked:
            raise UserError(
                f"{who}: {key} goes by samples of the policy, of which there are none; leave it out"
            )
    for where, part, instead in _parts(config):
        if not getattr(part.module, "TAKES_DEMONSTRATIONS", False):
            raise UserError(
                f"{who}: {where}: {part.name!r} takes completions for samples of the policy, by "
                f"their ratios or rewards; allowed with it: {instead}"
            )


def _parts(config: RunConfig) -> Iterator[tuple[str, Part, str]]:
    """Where each part stands, and what may stand there instead."""
    yield "objective", config.objective, "sft"
    yield "advantage", config.advantage, "none"
    if config.correction is not None:
        yield "correction", config.correction, "null"
    for kind in ("modulators", "selection", "regularisers"):
        for i, part in enumerate(getattr(config, kind)):
            if getattr(part.config, "coef", 1.0):
                other = "entropy, or []" if kind == "regularisers" else "[]"
                yield f"{kind}[{i}]", part, other
