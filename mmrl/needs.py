"""Terms that the parts of a run ask of the backend."""

from __future__ import annotations

from collections.abc import Iterator

from mmrl import facts, kl_in_reward
from mmrl.config import Part, RunConfig

Asked = tuple[str, frozenset[str]]
"""Who asks, in the words of a message, and for which terms."""


def asked_of_updates(config: RunConfig) -> Iterator[Asked]:
    """By the parts of the loss, and by modulators that treat decisions apart."""
    parts = [("objective", config.objective)]
    parts += [("correction", part) for part in [config.correction] if part is not None]
    parts += [("regularisers", part) for part in config.regularisers]
    parts += [("modulators", part) for part in config.modulators if hasattr(part.module, "needs")]
    for kind, part in parts:
        yield f"{kind}: {part.name!r}", part.module.needs(part.config)


def asked_before_updates(config: RunConfig) -> Iterator[Asked]:
    """By what asks the policy that sampled: rewards, estimators and selection."""
    readers = [("advantage", config.advantage), *(("modulators", p) for p in config.modulators)]
    for kind, part in readers:
        if facts.SCORE_NORM in facts.reads(part):
            yield f"{kind}: {part.name!r}", facts.SCORE_NORM_NEEDS
    for part in config.selection:
        yield f"selection: {part.name!r}", part.module.needs(part.config)
    if config.kl_in_reward is not None:
        yield "kl_in_reward", kl_in_reward.NEEDS


def needs_of(config: RunConfig) -> frozenset[str]:
    """Terms that the updates of a run ask of the backend."""
    return frozenset({"logp"}).union(*(needs for _, needs in asked_of_updates(config)))


def needs_of_run(config: RunConfig) -> frozenset[str]:
    """Terms that a whole run asks of the backend."""
    return needs_of(config).union(*(needs for _, needs in asked_before_updates(config)))


def asks_survey(part: Part) -> frozenset[str]:
    """Whose sample log-ratios a part reads before each optimizer step; mostly none."""
    ask = getattr(part.module, "survey", None)
    return ask(part.config) if ask else frozenset()
