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
from diffusion.lora import LORA_FILE, adapter_active, load_frozen, weights_folder
from diffusion.noise import NoiseKey
from mmrl.errors import UserError
from mmrl.schema import nearest
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
        tasks = {p.id: str(p.columns.get(config.task_column, "")) for p in prompts}
        teachers = {}
        for number, teacher in enumerate(config.teachers):
            teachers[teacher.task] = _load(teacher, f"teacher{number}", config, family)
        return Teachers(family.transformer, teachers, tasks)

    def refuse_untaught(self, prompts: Sequence[Prompt]) -> None:
        """``UserError`` if a prompt has no teacher."""
        for prompt in prompts:
            task = self._tasks.get(prompt.id, "")
            if task not in self._teachers:
                raise UserError(
                    f"teachers: none has the task {task!r} of prompt {prompt.text!r}; "
                    f"{nearest(task, sorted(self._teachers))}"
                )

    def velocities(
        self, rows: Rows, velocity: Callable[[Rows, float, nn.Module | None], Tensor]
    ) -> Tensor:
        """[R, ...]: each row's by its own teacher, with that teacher's guidance."""
        found = torch.empty_like(rows.states)
        for task in sorted({self._task(key) for key in rows.keys}):
            teacher = self._teachers[task]
            mine = torch.tensor([self._task(key) == task for key in rows.keys])
            chosen = mine.repeat(rows.num_decisions).to(rows.states.device)
            part = Rows(
                states=rows.states[chosen],
                sigma=rows.sigma[chosen],
                keys=[key for key in rows.keys if self._task(key) == task],
                detail=None,
            )
            with teacher.active(self._student):
                found[chosen] = velocity(part, teacher.config.guidance, teacher.network)
        return found

    def _task(self, key: NoiseKey) -> str:
        return self._tasks[key.prompt_id]


def _load(teacher: TeacherConfig, name: str, config: Config, family: Any) -> Teacher:
    path, where = Path(teacher.path), f"teachers: path = {teacher.path!r}"
    if not any((folder / LORA_FILE).is_file() for folder in (path / "final", path)):
        folder = weights_folder(path, "transformer", f"{where} holds no {LORA_FILE} and")
        return Teacher(teacher, name, _load_network(folder, family))
    if config.model.lora is None:
        raise UserError(f"{where} is an adapter, which a student without model.lora cannot hold")
    load_frozen(family.transformer, weights_folder(path, LORA_FILE, where), name, where)
    return Teacher(teacher, name, None)


def _load_network(folder: Path, family: Any) -> nn.Module:
    student = family.transformer
    network = type(student).from_pretrained(folder / "transformer", torch_dtype=student.dtype)
    return network.to(family.device).requires_grad_(False).eval()
