"""Contrastive flow matching of an implicit good and an implicit bad policy on clean samples.

    loss = adv_scale (r P + (1 - r) N)

P and N are the errors with which v_old + beta (v - v_old) and v_old - beta (v - v_old) predict the
sample, each over its own detached mean absolute error and over beta, and r in [0, 1] says how
likely the sample is a good one (DiffusionNFT, Zheng et al. 2025, arXiv:2509.16117; the form of
its released code).  At v = v_old the value does not depend on r, but the gradient is that of
advantage weighted matching, whatever beta is.

r is the advantage after the modulator ``optimality``.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Zheng et al. 2025, arXiv:2509.16117"
EVIDENCE = "code"
READS_PROBABILITIES = True


class Config(StrictModel):
    """Scale of the loss; beta belongs to the terms, so to the backend."""

    adv_scale: float = Field(
        default=5.0,
        gt=0,
        description="Factor of the loss. Released recipes: the bound of the advantages, which "
        "undoes the division by it in r.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    del config
    return frozenset({"implicit_positive", "implicit_negative"})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Contrastive loss [B, K].

    Metrics: ``nft/positive`` and ``nft/negative``, the means of P and N; ``nft/optimality``, the
    mean of r over samples.

    Raises:
        UserError: r of a trained sample outside [0, 1].
    """
    optimality = _optimality(batch).to(terms.logp.dtype)
    positive = where_active(terms.need("implicit_positive"), batch.mask)
    negative = where_active(terms.need("implicit_negative"), batch.mask)
    value = config.adv_scale * (optimality * positive + (1.0 - optimality) * negative)
    metrics = {"nft/positive": positive, "nft/negative": negative, "nft/optimality": optimality}
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))


def _optimality(batch: UpdateBatch) -> Tensor:
    """r [B, 1]."""
    trained = batch.advantages[batch.weights > 0]
    outside = trained[~((trained >= 0) & (trained <= 1))]
    if len(outside):
        raise UserError(
            f"objective nft: advantage {float(outside[0]):g} is not a probability; allowed: 0 to "
            "1; put `optimality` last among the modulators"
        )
    return batch.advantages[:, None]
