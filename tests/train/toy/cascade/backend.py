"""Gaussians that start from the exported mean of another run."""

from __future__ import annotations

import torch

from mmrl.errors import UserError
from toy.gauss import backend as gauss
from toy.gauss.backend import describe

__all__ = ["build", "describe", "estimate_memory"]


def build(config, **options):
    backend = gauss.build(config, **options)
    if config.start is not None:
        backend.average = torch.load(exported(config), weights_only=True)
        backend.model.mean.data.copy_(backend.average)
    return backend


def estimate_memory(config):
    if config.start is not None:
        exported(config)
    return gauss.estimate_memory(config)


def exported(config):
    path = config.start / "final" / "mean.pt"
    if not path.is_file():
        raise UserError(f"backend.start: there is no {path}")
    return path
