"""Frozen policies that a student is distilled from, one for each task (DiffusionOPD).

A teacher is an adapter beside the student's, on the same network, or a network of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.config import Config, TeacherConfig
from diffusion.decisions import Rows
from diffusion.lora import LORA_FILE, load_frozen, teacher_folder
from diffusion.models.base import is_hub_id
from mmrl.adapters import adapter_active
from mmrl.config import read_yaml
from mmrl.errors import UserError
from mmrl.noise import NoiseKey
from mmrl.run_folder import CONFIG
from mmrl.schema import validate
from mmrl.sharding import is_split
from mmrl.types import Prompt


@dataclass(frozen=True)
class Teacher:
    """``network``: its own, or ``None`` for the student's with ``adapter`` active."""

    config: TeacherConfig
    adapter: str
    network: nn.Module | None

    def active(self, student: nn.Module) -> AbstractContextManager[None]:
        """Within it the student's network computes this teacher, unless it has its own."""
        return nullcontext() if self.network else adapter_active(student, self.adapter)


class Teachers:
    """The teachers of a run, and which prompts are whose."""

    def __init__(self, student: nn.Module, teachers: dict[str, Teacher], tasks: dict[str, str]):
        """``teachers`` by task; ``tasks`` by prompt id."""
        self._student = student
        self._teachers = teachers
        self._tasks = tasks

    @staticmethod
    def load(config: Config, family: Any, prompts: Sequence[Prompt]) -> Teachers:
        """``UserError`` for a teacher that is not there or does not fit."""
        tasks = {prompt.id: prompt.task for prompt in prompts}
        teachers = {}
        for number, teacher in enumerate(config.teachers):
            teachers[teacher.task] = _load(teacher, f"teacher{number}", config, family)
        return Teachers(family.transformer, teachers, tasks)

    @property
    def networks(self) -> list[nn.Module]:
        """Those that teachers have of their own."""
        return [t.network for t in self._teachers.values() if t.network is not None]

    def velocities(
        self, rows: Rows, velocity: Callable[[Rows, float, nn.Module | None], Tensor]
    ) -> Tensor:
        """[R, ...]: each row's by its own teacher, with that teacher's guidance."""
        found = torch.empty_like(rows.states)
        split = is_split(self._student)
        for task, teacher in sorted(self._teachers.items()):
            mine = [self._task(key) == task for key in rows.keys]
            # Processes with other tasks must meet for every forward of a split network.
            if any(mine) or (split and teacher.network is None):
                part, chosen = _part(rows, mine if any(mine) else [True, *mine[1:]])
                with teacher.active(self._student):
                    values = velocity(part, teacher.config.guidance, teacher.network)
                found[chosen] = values if any(mine) else found[chosen]
        return found

    def _task(self, key: NoiseKey) -> str:
        return self._tasks[key.prompt_id]


def _part(rows: Rows, mine: Sequence[bool]) -> tuple[Rows, Tensor]:
    """The rows of some samples, and which of all rows [R] they are."""
    chosen = torch.tensor(mine).repeat(rows.num_decisions).to(rows.states.device)
    keys = [key for key, is_mine in zip(rows.keys, mine, strict=True) if is_mine]
    part = Rows(states=rows.states[chosen], sigma=rows.sigma[chosen], keys=keys, detail=None)
    return part, chosen


def _load(teacher: TeacherConfig, name: str, config: Config, family: Any) -> Teacher:
    folder, where = teacher_folder(teacher), f"teachers: path = {teacher.path!r}"
    if not (folder / LORA_FILE).is_file():
        return Teacher(teacher, name, _load_network(folder, family))
    if config.model.lora is None:
        raise UserError(f"{where} is an adapter, which a student without model.lora cannot hold")
    load_frozen(family.transformer, folder, name, where)
    return Teacher(teacher, name, None)


def _load_network(folder: Path, family: Any) -> nn.Module:
    student = family.transformer
    network = type(student).from_pretrained(folder / "transformer", torch_dtype=student.dtype)
    return network.to(family.device).requires_grad_(False).eval()


# What the runs that made the teachers say of them.

GRID = ("grid", "shift", "shift_terminal")
"""Settings of a rollout that choose the noise levels at which a policy is asked."""


def compare_with_runs(config: Config) -> list[str]:
    """A warning for each setting in which a teacher's own run differs from its use here.

    ``UserError`` for a teacher that is not there, and for an adapter trained on another model.
    Nothing is known of a teacher that is not in a run folder.
    """
    lines = []
    for number, teacher in enumerate(config.teachers):
        where = f"teachers[{number}] ({teacher.path})"
        folder = teacher_folder(teacher)
        run = folder.resolve().parent
        if folder.resolve().name != "final" or not (run / CONFIG).is_file():
            continue
        try:
            recorded = _recorded(run)
        except UserError as error:
            reason = str(error).splitlines()[0]
            lines.append(f"{where}: not compared with its own run, {CONFIG} of which says {reason}")
            continue
        if (folder / LORA_FILE).is_file():
            _refuse_other_model(where, config.model.path, recorded.model.path)
        lines += [f"{where}: {line}" for line in _differences(config, teacher, recorded)]
    return [f"warning: {line}" for line in lines]


def _recorded(run: Path) -> Config:
    """The backend section that a run was made with; ``UserError`` if it cannot be read as one."""
    section = read_yaml(run / CONFIG).get("backend")
    own = {k: v for k, v in section.items() if k != "name"} if isinstance(section, dict) else None
    return validate(Config, own, "backend")


def _differences(config: Config, teacher: TeacherConfig, recorded: Config) -> list[str]:
    """What the teacher's velocities depend on and is not as in its own run."""
    ours, theirs = config.rollout, recorded.rollout
    pairs = [("guidance", teacher.guidance, "rollout.guidance", theirs.guidance)]
    for name in GRID:
        key = f"rollout.{name}"
        pairs.append((key, getattr(ours, name), key, getattr(theirs, name)))
    lines = [
        f"{key} = {_text(here)}, but its own run had {their_key} = {_text(there)}"
        for key, here, their_key, there in pairs
        if here != there
    ]
    if not _same_folder(config.model.path, recorded.model.path):
        lines.append(_paths(config.model.path, recorded.model.path))
    return lines


def _refuse_other_model(where: str, ours: str, theirs: str) -> None:
    """``UserError`` if an adapter belongs to another model for certain.

    A folder may hold what is also on a hub, and one that is not there may have been moved.
    """
    both = (ours, theirs)
    certain = all(Path(path).is_dir() for path in both) or all(map(is_hub_id, both))
    if certain and not _same_folder(ours, theirs):
        raise UserError(
            f"{where} is an adapter of another model: {_paths(ours, theirs)}; allowed: an adapter "
            "that was trained on this model"
        )


def _same_folder(ours: str, theirs: str) -> bool:
    return ours == theirs or Path(ours).resolve() == Path(theirs).resolve()


def _paths(ours: str, theirs: str) -> str:
    return f"model.path = {ours!r}, but its own run had model.path = {theirs!r}"


def _text(value: Any) -> str:
    """A setting as YAML says it."""
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
