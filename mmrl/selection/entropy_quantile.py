"""Trains only the most uncertain decisions of a step, where the policy could go either way.

    decisions   the largest H_ik of a step, a share of them all, H: entropy of the sampling policy

Wang et al. 2025, "Beyond the 80/20 rule" (arXiv:2506.01939): a fifth of the tokens, where reasoning
forks, carries what reinforcement learning teaches.  TRL has it as ``top_entropy_quantile``, 1 minus
that quantile being the threshold.  Samples and advantages stay as they were.

Known from ports of the authors' code and from TRL, which differ.  There decisions left out leave
the sum and its denominator, as here; in TRL they count as 0 in every mean, and penalties train them
all the same, which here none does.  Both take the quantile of a micro-batch under the present
policy (TRL's is of all processes); here it is that of the whole step under the policy that sampled,
so that no result depends on how a step is split.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mmrl.schema import StrictModel
from mmrl.selection._kept import narrowed
from mmrl.types import Advantages, Moment, PolicyTerms, Scores

PAPER = "Wang et al. 2025, arXiv:2506.01939"
EVIDENCE = "code"
MIN_GROUP_SIZE = 1


class Config(StrictModel):
    """How many decisions are trained."""

    share: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description="Share of the decisions of a step that are trained, those of the highest "
        "entropy (rounded up) and their equals; 1 leaves nothing out.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms of the policy that sampled; none where all decisions are kept."""
    return frozenset({"logp", "entropy"} if config.share < 1 else ())


def select(advantages: Advantages, scores: Scores, moment: Moment, config: Config) -> Advantages:
    """Every sample kept before, though it may lose all its decisions.  Metrics of ``narrowed``."""
    del scores, moment, config
    return narrowed(advantages, advantages.keep)


def decision_share(moment: Moment, config: Config) -> float:
    """Share of the decisions that are trained, in (0, 1]."""
    del moment
    return config.share


def decision_keys(values: Tensor, terms: PolicyTerms, config: Config) -> Tensor:
    """Entropy [B, K], nats, whatever the advantages: the decisions with the largest are trained."""
    del values, config
    return terms.need("entropy")
