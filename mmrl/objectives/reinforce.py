"""Plain policy gradient: minus the advantage times the log-probability.

    loss = -A logp

Williams 1992 (REINFORCE).  Strictly on-policy: no importance ratio corrects for stale samples.
"""

from __future__ import annotations

from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Williams 1992, doi:10.1007/BF00992696"
EVIDENCE = "paper"


class Config(StrictModel):
    """Nothing to configure."""


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"logp"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Policy-gradient loss [B, K]; metric ``logp/mean`` in nats per decision."""
    del config
    logp = where_active(terms.logp, batch.mask)
    value = -batch.advantages[:, None].to(logp.dtype) * logp
    return LossTerms(loss=value, metrics=tallies({"logp/mean": logp}, batch.mask, batch.weights))
