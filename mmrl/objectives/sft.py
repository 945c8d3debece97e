"""Maximum likelihood: minus the log-probability of demonstrations, or of samples that were kept.

    loss = -logp

Supervised fine-tuning: on completions of the data set (``backend.rollout.demonstrations``), or on
what the policy itself sampled; with only the good samples kept that is the training step of RAFT
(Dong et al. 2023, arXiv:2304.06767).  The size and the sign of an advantage
count for nothing: what should not be learned must not be kept.
"""

from __future__ import annotations

from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Dong et al. 2023, arXiv:2304.06767"
EVIDENCE = "paper"
IGNORES_SIGN = True
TAKES_DEMONSTRATIONS = True


class Config(StrictModel):
    """Nothing to configure."""


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Negative log-likelihood [B, K]; metric ``nll``, the same in nats per decision."""
    del config
    nll = -where_active(terms.logp, batch.mask)
    return LossTerms(loss=nll, metrics=tallies({"nll": nll}, batch.mask, batch.weights))
