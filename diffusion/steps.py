"""Which denoising steps of a rollout add noise, and which of those are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from diffusion.kernels import Kernel, StepTable, scorable, step_table, unscorable
from mmrl.errors import UserError
from mmrl.schema import StrictModel


@dataclass(frozen=True, kw_only=True)
class StepTables:
    """The steps of one rollout: ``noisy`` by the kernel, and ``ode`` where no noise is added."""

    kernel: Kernel
    noisy: StepTable
    ode: StepTable

    @staticmethod
    def of(kernel: Kernel, sigmas: Tensor, noise_level: float) -> StepTables:
        """Tables for the levels ``sigmas`` [N + 1]; ``UserError`` as ``step_table``."""
        noisy = step_table(kernel, sigmas, noise_level)
        return StepTables(kernel=kernel, noisy=noisy, ode=step_table("ode", sigmas, 0.0))

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.noisy.sigma)

    @property
    def trainable(self) -> list[int]:
        """Steps that can be trained: those with a density; all of an ODE, which has none."""
        return list(range(self.num_steps)) if self.kernel == "ode" else scorable(self.noisy)

    def excluded(self) -> dict[int, str]:
        """The other steps, each with the reason in words."""
        return {} if self.kernel == "ode" else unscorable(self.noisy)


class StepsConfig(StrictModel):
    """Which steps are trained and where noise is added."""

    select: Literal["all", "window", "subset"] = Field(
        default="all",
        description="Every step that can be scored, consecutive ones, or any.",
    )
    size: int | None = Field(
        default=None,
        ge=1,
        description="Steps of a window or subset.",
    )
    start: int | None = Field(
        default=None,
        ge=0,
        description="First step of the window; null: drawn anew for each training step.",
    )
    before: int | None = Field(
        default=None,
        ge=1,
        description="Only steps with a smaller index; null: all.",
    )
    noise: Literal["trained", "scorable", "all"] = Field(
        default="trained",
        description="Steps that add noise; the others follow the ODE. all: the last one too, whose "
        "noise stays in the image (Flow-GRPO as released).",
    )
    shared_by: Literal["step", "group", "sample"] = Field(
        default="step",
        description="Draw once for a whole training step, for each group or each sample.",
    )

    def candidates(self, tables: StepTables) -> list[int]:
        """Steps that may be trained."""
        limit = tables.num_steps if self.before is None else self.before
        return [step for step in tables.trainable if step < limit]

    def noisy(self, tables: StepTables, trained: Sequence[int]) -> Sequence[int]:
        """Steps that add noise to a sample of which ``trained`` are trained."""
        steps = {"trained": trained, "scorable": tables.trainable}
        return steps.get(self.noise, range(tables.num_steps))

    def count(self, tables: StepTables) -> int:
        """Trained steps of a sample."""
        return self.size if self.size is not None else len(self.candidates(tables))

    def check(self, tables: StepTables) -> None:
        """``UserError`` for a choice that cannot be made, or would compare unlike with unlike."""
        steps = self.candidates(tables)
        if (self.size is None) != (self.select == "all"):
            raise UserError(
                f"likelihood.steps.size = {self.size} with select = {self.select!r}; "
                "set it for 'window' and 'subset', and only for them"
            )
        if self.start is not None and self.select != "window":
            raise UserError(f"likelihood.steps.start = {self.start} needs select = 'window'")
        limit = "" if self.before is None else f" before step {self.before} (steps.before)"
        if not steps:
            raise UserError(
                f"likelihood.steps: none{limit} can be trained: {why_not(tables)}; "
                "likelihood.noise_level sets the noise"
            )
        if (self.size or 0) > len(steps):
            others = why_not(tables)
            raise UserError(
                f"likelihood.steps.size = {self.size}; allowed: 1 to {len(steps)}, the steps"
                f"{limit} that can be trained" + (others and f"; {others}")
            )
        if (
            self.start is not None
            and self.start not in steps[: len(steps) - self.count(tables) + 1]
        ):
            raise UserError(
                f"likelihood.steps.start = {self.start}: a window of {self.size} must lie within "
                f"steps {steps[0]} to {steps[-1]}"
            )
        if self.noise == "trained" and self.shared_by == "sample" and self.select != "all":
            raise UserError(
                "likelihood.steps.shared_by = 'sample' with noise = 'trained' would give the "
                "samples of a group different kernels; allowed: 'step', 'group', or other noise"
            )

    def draw(self, tables: StepTables, generator: torch.Generator) -> list[int]:
        """The trained steps of a sample, ascending."""
        steps, count = self.candidates(tables), self.count(tables)
        if self.select == "window":
            if self.start is None:
                first = int(torch.randint(len(steps) - count + 1, (), generator=generator))
            else:
                first = steps.index(self.start)
            return steps[first : first + count]
        if self.select == "subset":
            chosen = torch.randperm(len(steps), generator=generator)[:count].tolist()
            return sorted(steps[i] for i in chosen)
        return steps


def why_not(tables: StepTables) -> str:
    """The steps that cannot be scored, those of one reason together."""
    excluded = tables.excluded()
    together = {
        reason: [str(step) for step, why in excluded.items() if why == reason]
        for reason in dict.fromkeys(excluded.values())
    }
    return "; ".join(
        f"{'each of the steps' if len(steps) > 1 else 'step'} {', '.join(steps)} {reason}"
        for reason, steps in together.items()
    )
