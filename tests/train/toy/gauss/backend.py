"""x_k ~ N(mu_k, 1): a policy with K independent decisions, one parameter each."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from mmrl.sharding import trainable, whole, write
from mmrl.types import Anchor, PolicyTerms, RolloutGroup

FLOW = frozenset(
    {
        "mean_gap_old",
        "mean_gap_teacher",
        "step_std",
        "step_size",
        "implicit_positive",
        "implicit_negative",
    }
)
SIZES = 64
"""More decisions than a toy has."""


class Policy(nn.Module):
    def __init__(self, decisions):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(decisions))

    def forward(self, x, decisions=slice(None)):
        """Log-probabilities without their constant, and the means, both of the shape of ``x``."""
        mean = self.mean[decisions].expand_as(x)
        return -0.5 * (x - mean) ** 2, mean


class ToyBackend:
    def __init__(self, config):
        self.config = config
        self.model = Policy(config.decisions)
        self.average = self.model.mean.detach().clone()
        self.off_policy = config.off_policy
        self.notes = ()
        self.updates = 0
        self.calls = []

    @torch.no_grad()
    def rollout(self, requests, *, evaluation=False):
        policy = getattr(self.model, "module", self.model)
        mean = whole(trainable(policy))["mean"]
        for request in requests:
            rows = [noise(request, i, self.config.decisions) for i in range(request.group_size)]
            x = torch.stack(rows) + mean
            yield RolloutGroup(
                request=request,
                outputs=[row.tolist() for row in x],
                payload=x,
                mask=torch.ones(x.shape, dtype=torch.bool),
                logp_old=policy(x)[0] if self.config.knows_logp else None,
            )

    def collate(self, rows, decisions=slice(None)):
        x = torch.stack([group.payload[i] for group, i in rows])[:, decisions]
        return (x, decisions), torch.ones(x.shape, dtype=torch.bool)

    def evaluate(self, batch, needs):
        x, decisions = batch.payload
        self.calls.append(len(x))
        logp, mean = self.model(x, decisions)
        if torch.is_grad_enabled() and self.config.drift:
            logp = logp + self.config.drift
        if torch.is_grad_enabled() and self.config.poison_step == self.updates:
            logp = logp * torch.tensor(float("nan"))
        reference = -0.5 * x**2 if "logp_ref" in needs else None
        entropy = x.abs() + 0.1 if "entropy" in needs else None
        tempered = None
        if "logp_tempered" in needs:  # N(mu, T), without its constant as logp is
            known = batch.memory is not None
            own = logp.detach() / batch.tempering.temperature
            tempered = torch.stack(list(batch.memory)) if known else own
        flow = {}
        if FLOW & needs:
            known = batch.memory is not None and "mean_gap_old" in needs
            old = torch.stack(list(batch.memory)) if known else mean.detach()
            found = flow_terms(x, mean, old, self.average[decisions], decisions)
            flow = {name: value for name, value in found.items() if name in needs}
        return PolicyTerms(
            logp=logp, logp_ref=reference, entropy=entropy, logp_tempered=tempered, **flow
        )

    def anchor(self, batch, needs):
        terms = self.evaluate(batch, needs)
        memory = terms.logp_tempered if "logp_tempered" in needs else [None] * len(terms.logp)
        if "mean_gap_old" in needs:
            memory = self.model(*batch.payload)[1].clone()
        return [Anchor(logp=x, memory=m) for x, m in zip(terms.logp, memory, strict=True)]

    def save_samples(self, payload):
        return {"x": payload}

    def load_samples(self, request, tensors):
        return tensors["x"]

    def behaviour(self):
        return self.averaged() if self.off_policy else nullcontext()

    @contextmanager
    def averaged(self):
        policy = getattr(self.model, "module", self.model)
        live = whole(trainable(policy))
        write(trainable(policy), {"mean": self.average})
        yield
        write(trainable(policy), live)

    def after_update(self, step):
        self.updates += 1
        policy = getattr(self.model, "module", self.model)
        self.average = 0.5 * self.average + 0.5 * whole(trainable(policy))["mean"]

    def auxiliary_state(self):
        return {"average": self.average}

    def load_auxiliary_state(self, state):
        self.average = state["average"].clone()

    def export(self, folder, card):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.average, folder / "mean.pt")


def flow_terms(x, mean, old, average, decisions):
    """What models of images tell, of the Gaussians: a teacher at 1, steps of unlike sizes."""
    size = (0.5 + 0.5 * torch.arange(SIZES))[decisions][: x.shape[1]].expand_as(x)

    def implied(beta):
        error = x - average - beta * (mean - average)
        return error.square() / (error.detach().abs() + 0.1)

    return {
        "mean_gap_old": (mean - old).square(),
        "mean_gap_teacher": (mean - 1.0).square(),
        "step_std": size,
        "step_size": size,
        "implicit_positive": implied(1.0),
        "implicit_negative": implied(-1.0),
    }


def noise(request, index, size):
    key = f"{request.seed}/{request.stream}/{request.prompt.id}/{index}"
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def build(config, *, device, prompts, seed, needs):
    return ToyBackend(config)


def describe(config):
    return [f"model: {config.decisions} Gaussians"]


def estimate_memory(config):
    return {"weights": 4.0 * config.decisions, "activations_per_decision": 8.0}
