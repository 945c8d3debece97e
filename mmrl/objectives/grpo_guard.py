"""Clipped policy gradient on denoising steps whose log-ratio is centred and rescaled step by step.

    b     = mean (mu - mu_old)^2 / (2 S^2)
    log r = (logp - logp_old + b) S
    loss  = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high)) / (-dt)

GRPO-Guard (Wang et al. 2025, arXiv:2510.22319; the form of its released code).  The log-ratio of a
Gaussian step has mean -b and a spread that grows with 1/S, so a clip range acts on one side, and
on some steps only.  With x' = mu_old + S z the log r above is mean(z (mu - mu_old)): mean zero, no
trace of S.  Dividing by -dt evens out the gradients of the steps.  Clip ranges of released recipes,
2e-6 for SD3.5 and 4e-6 for FLUX.1, hold for the log-ratio times S.

``logp`` must be the Gaussian log-density of the step, with means over latent dimensions throughout.
That of the ``cps`` kernel leaves out 1 / (2 S^2), so b does not centre it: use ``flow_sde`` or
``dance_sde``.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mmrl.divergences import active_spread, clamp_log_ratio, gaussian_kl, raw_log_ratio
from mmrl.objectives._moments import by_sigma, moments
from mmrl.objectives._ratio import approx_kl, clipped_surrogate, ratio_metrics
from mmrl.reduction import tallies, where_active
from mmrl.schema import StrictModel
from mmrl.types import LossTerms, PolicyTerms, UpdateBatch

PAPER = "Wang et al. 2025, arXiv:2510.22319"
EVIDENCE = "code"


class Config(StrictModel):
    """Clip range, and a switch for each of the three corrections; without them it is ``grpo``."""

    clip_low: float = Field(
        default=2e-6, ge=0, description="The ratio is clipped below at 1 - clip_low."
    )
    clip_high: float = Field(
        default=2e-6, ge=0, description="The ratio is clipped above at 1 + clip_high."
    )
    drift_correction: bool = Field(
        default=True, description="Add b, the mean drift, to the log-ratio."
    )
    std_normalisation: bool = Field(default=True, description="Multiply the log-ratio by S.")
    reweight: bool = Field(default=True, description="Divide the loss of a step by -dt.")
    log_by_sigma: bool = Field(
        default=False,
        description="Also log the log_ratio metrics of each step apart, such as "
        "log_ratio/mean/0.960 for the step from sigma 0.96.",
    )


def needs(config: Config) -> frozenset[str]:
    """Terms the backend must compute: those of what is switched on."""
    terms = {
        "mean_gap_old": config.drift_correction,
        "step_std": config.drift_correction or config.std_normalisation,
        "step_size": config.reweight,
        "sigma": config.log_by_sigma,
    }
    return frozenset({"logp", *(name for name, on in terms.items() if on)})


def loss(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> LossTerms:
    """Clipped surrogate [B, K].

    Metrics: those of ``grpo`` with the corrected ratio (``approx_kl`` stays that of the plain
    one); ``log_ratio/mean`` and ``log_ratio/sq``, first and second moment of log r, and with the
    suffix ``_raw`` those of logp - logp_old.  A variance is sq - mean^2.

    Raises:
        UserError: S or -dt is not positive at a decision where a correction divides by it.
    """
    raw, corrected = log_ratios(terms, batch, config)
    ratio = clamp_log_ratio(corrected).exp()
    advantages = batch.advantages[:, None].to(ratio.dtype)
    surrogate = clipped_surrogate(ratio, advantages, config.clip_low, config.clip_high)
    if config.reweight:
        surrogate = surrogate / _active(terms, batch, "step_size")
    metrics = ratio_metrics(ratio, advantages, config.clip_low, config.clip_high)
    metrics["approx_kl"] = approx_kl(terms, batch)
    both = moments(raw, corrected)
    pairs = tallies(metrics | both, batch.mask, batch.weights)
    if config.log_by_sigma:
        pairs |= by_sigma(both, terms.need("sigma"), batch)
    return LossTerms(loss=surrogate, metrics=pairs)


def log_ratios(terms: PolicyTerms, batch: UpdateBatch, config: Config) -> tuple[Tensor, Tensor]:
    """Plain and corrected log-ratios [B, K], not clamped; 0 at masked decisions.

    Without ``logp_old`` both are exactly 0: then mu_old is mu, so b and its gradient vanish.
    """
    raw = corrected = raw_log_ratio(terms, batch)
    if config.drift_correction and batch.logp_old is not None:
        gap = where_active(terms.need("mean_gap_old"), batch.mask)
        corrected = corrected + gaussian_kl(gap, _active(terms, batch, "step_std"))
    if config.std_normalisation:
        corrected = corrected * _active(terms, batch, "step_std")
    return raw, corrected


def _active(terms: PolicyTerms, batch: UpdateBatch, name: str) -> Tensor:
    return active_spread(terms.need(name), batch.mask, f"objective grpo_guard: {name}")
