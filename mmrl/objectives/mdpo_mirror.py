"""Mirror descent: linearised reward less a divergence from the policy before, by a few plain steps.

    loss = -r A + D / t,   D = r log r - r + 1,   r = exp(logp - logp_old)      sample_kl
    loss = -r A + D / t,   D = mean (mu - mu_old)^2 / (2 S^2)                   gaussian_kl
    loss = (sum of log r / t - A)^2                                             squared

MDPO (arXiv:2005.09814; on-policy form of the released code).  D, in nats per decision, estimates
KL(new || old) from samples of the old policy without bias and is never negative.  The optimum of a
decision is old exp(t A) / Z, where log r = t A.  At the first step after a rollout D has no
gradient: make several (training.num_epochs, training.updates_per_epoch), or it is a plain policy
gradient.  Released schedule: t falls from 1 linearly with the share of the run that is done; its
floor is ours.

The forms for samples of a group are a carry-over, not the paper's: ``gaussian_kl`` is exact for
denoising steps that add noise; ``squared``, at the level of samples, is that of mirror-descent
recipes for language models, whose gradient at r = 1 is -(2 / t) A times that of the sample's
log-probability.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mmrl.divergences import active_spread, gaussian_kl, raw_log_ratio
from mmrl.objectives._ratio import approx_kl, log_ratio
from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Tomar et al. 2020, arXiv:2005.09814"
EVIDENCE: str = "code"
TAKES_STALE = True


class Config(StrictModel):
    """Which divergence, and the step size."""

    form: Literal["sample_kl", "gaussian_kl", "squared"] = Field(
        default="sample_kl",
        description="sample_kl: from the ratio. gaussian_kl: in closed form, of denoising steps. "
        "squared: regression of each sample's log-ratio onto t A.",
    )
    step_size: float = Field(
        default=1.0, gt=0, description="t at the start: larger steps move further. Published: 1."
    )
    schedule: Literal["constant", "linear"] = Field(
        default="constant",
        description="linear: t falls in proportion to the steps that are left (published).",
    )
    step_size_min: float = Field(default=0.05, gt=0, description="Floor of t with `linear`.")


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute."""
    gaussian = {"mean_gap_old", "step_std"} if config.form == "gaussian_kl" else set[str]()
    return frozenset({"logp"} | gaussian)


def needs_whole_samples(config: Config) -> bool:
    """Whether a micro-batch must hold all decisions of its samples."""
    return config.form == "squared"


def step_size(progress: float, config: Config) -> float:
    """t when the share ``progress`` of the run is done."""
    if config.schedule == "constant":
        return config.step_size
    return max(config.step_size * (1.0 - progress), min(config.step_size_min, config.step_size))


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Loss of the proximal step, [B, K], or [B, 1] for ``squared``.

    Metrics: ``ratio/mean``; ``mdpo/divergence``, the mean of D, but for ``squared``, that of the
    squares; ``approx_kl``, k3 of KL(old || new) in nats per decision.

    Raises:
        UserError: ``gaussian_kl`` at a step without noise.
    """
    t = step_size(batch.progress, config)
    log = log_ratio(terms, batch, "decision")
    ratio, advantages = log.exp(), batch.advantages[:, None].to(log.dtype)
    if config.form == "squared":
        total = raw_log_ratio(terms, batch).sum(dim=1, keepdim=True)
        value = found = (total / t - advantages).square()
    else:
        found = _divergence(terms, batch, log) if config.form == "gaussian_kl" else None
        found = ratio * log - ratio + 1.0 if found is None else found
        value = -ratio * advantages + found / t
    metrics = {
        "ratio/mean": ratio,
        "mdpo/divergence": found,
        "approx_kl": approx_kl(terms, batch),
    }
    return LossTerms(loss=value, metrics=tallies(metrics, batch.mask, batch.weights))


def _divergence(terms: PolicyTerms, batch: UpdateBatch, log: Tensor) -> Tensor:
    """Of the Gaussian steps; 0 strictly on-policy, where mu_old is mu."""
    spread = active_spread(terms.need("step_std"), batch.mask, "objective mdpo_mirror: step_std")
    if batch.logp_old is None:
        return log * 0.0
    return gaussian_kl(where_active(terms.need("mean_gap_old"), batch.mask), spread)
