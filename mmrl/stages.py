"""Several runs in one command, one after another: teachers and then a student, or a cascade.

A stages file names the configuration of each run and what is changed in it; ``{stage}`` in a
changed value is the run folder of that earlier stage.  Every stage is an ordinary run; what all of
them cost together is added up.
"""

from __future__ import annotations

import gc
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import gather_object
from pydantic import Field, field_validator

from mmrl import preflight
from mmrl.config import RunConfig, apply_overrides, parse, read_yaml
from mmrl.distributed import one_group_of_processes
from mmrl.errors import UserError
from mmrl.run_folder import CONFIG, Change, before_after, read_run
from mmrl.schema import StrictModel, nearest, validate

RECORD, REPORT = "stages.json", "stages.html"
HEAD = ("stage", "steps", "wall seconds", "CPU seconds", "held-out metric", "before", "after")
_REFERENCE = re.compile(r"\{([A-Za-z0-9_-]+)\}")
_OWN_KEYS = ("name", "output_dir")  # of the stages file; those of a stage follow from them


class StageSpec(StrictModel):
    """One stage as it is written."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_-]+$", description="names the run folder and references to it"
    )
    config: Path = Field(description="YAML file of a run, relative to the stages file")
    set: dict[str, Any] = Field(
        default={}, description="a.b: value; replaces values of that file. {stage}: a run folder"
    )

    @field_validator("name")
    @classmethod
    def _no_key_of_a_run(cls, name: str) -> str:
        # `rewards.0.weight=2` on the command line must mean one thing.
        if name in RunConfig.model_fields:
            raise ValueError("is a key of every run; choose another name")
        return name

    @field_validator("set")
    @classmethod
    def _names_no_folder(cls, values: dict[str, Any]) -> dict[str, Any]:
        for key in _OWN_KEYS:
            if key in values:
                raise ValueError(f"{key!r} follows from the stages file and cannot be set")
        return values


class StagesSpec(StrictModel):
    """A stages file."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="name of the whole")
    output_dir: Path = Field(
        default=Path("runs/{name}"), description="holds a run folder for each stage"
    )
    stages: list[StageSpec] = Field(min_length=1, description="in the order in which they train")

    @field_validator("stages")
    @classmethod
    def _distinct(cls, stages: list[StageSpec]) -> list[StageSpec]:
        names = [stage.name for stage in stages]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} stages are named {name!r}")
        return stages

    @property
    def folder(self) -> Path:
        """The folder of all stages."""
        return Path(str(self.output_dir).replace("{name}", self.name))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A run of several. ``needs``: run folders, by stage, that its configuration refers to."""

    name: str
    config: RunConfig
    needs: Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Runs in order, and the folder that holds theirs."""

    name: str
    folder: Path
    stages: Sequence[Stage]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a stage has cost so far, over all processes and continuations.

    ``cpu`` seconds are summed over processes (and their children), ``wall`` seconds are not.
    """

    wall: float = 0.0
    cpu: float = 0.0
    finished: bool = False

    def __add__(self, later: Spent) -> Spent:
        """With the cost of a continuation, which decides whether the stage is finished."""
        return Spent(wall=self.wall + later.wall, cpu=self.cpu + later.cpu, finished=later.finished)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A line of the table: finished ``steps``, what they cost, first and last evaluation."""

    name: str
    steps: int
    spent: Spent
    changes: Sequence[Change] = field(default=())


# ------------------------------------------------------------------ from YAML to a plan


def is_stages_file(data: Mapping[str, Any]) -> bool:
    """Whether this is, or was meant to be, a stages file rather than the configuration of a run."""
    misspelt = get_close_matches("stages", [str(key) for key in data], n=1, cutoff=0.8)
    return "stages" in data or bool(misspelt and "backend" not in data)


def load(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The validated plan in ``path``; ``UserError`` naming whatever is wrong in any stage.

    An override is ``stage.a.b=value`` for one stage, ``a.b=value`` for every stage, or
    ``name=value`` and ``output_dir=value`` for the stages file itself.
    """
    own = [override for override in overrides if _head(override) in _OWN_KEYS]
    spec = validate(StagesSpec, apply_overrides(read_yaml(path), own))
    chosen = _by_stage(overrides, [stage.name for stage in spec.stages])
    stages: list[Stage] = []
    folders: dict[str, Path] = {}
    for i, stage in enumerate(spec.stages):
        where = f"stages[{i}]"
        changes, needs = _changes(stage, chosen[stage.name], folders, where)
        with _naming(f"{where}.config"):
            written = read_yaml(path.parent / stage.config)
        folder = folders[stage.name] = spec.folder / stage.name
        changes.append(_override("name", f"{spec.name}-{stage.name}"))
        changes.append(_override("output_dir", str(folder)))
        with _naming(f"stage {stage.name!r}"):
            config = parse(apply_overrides(written, changes))
        stages.append(Stage(name=stage.name, config=config, needs=needs))
    return Plan(name=spec.name, folder=spec.folder, stages=stages)


def _changes(
    stage: StageSpec, overrides: Sequence[str], earlier: Mapping[str, Path], where: str
) -> tuple[list[str], dict[str, Path]]:
    """Overrides of a stage with its references filled in, and what they refer to."""
    needs: dict[str, Path] = {}
    changes = []
    for key, value in stage.set.items():
        filled = _filled(value, earlier, needs, f"{where}.set.{key}")
        changes.append(_override(key, filled))
    for override in overrides:
        changes.append(_filled(override, earlier, needs, f"override {override!r}"))
    return changes, needs


def _filled(value: Any, earlier: Mapping[str, Path], needs: dict[str, Path], where: str) -> Any:
    """``value`` with ``{stage}`` replaced in every text; adds what it found to ``needs``."""
    if isinstance(value, Mapping):
        return {key: _filled(item, earlier, needs, where) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, earlier, needs, where) for item in value]
    if not isinstance(value, str):
        return value

    def folder(match: re.Match[str]) -> str:
        name = match[1]
        if name not in earlier:
            hint = nearest(name, list(earlier)) if earlier else "this is the first stage"
            raise UserError(f"{where}: {match[0]} names no earlier stage; {hint}")
        needs[name] = earlier[name]
        return str(earlier[name])

    return _REFERENCE.sub(folder, value)


def _by_stage(overrides: Sequence[str], names: Sequence[str]) -> dict[str, list[str]]:
    """The overrides of each stage, without its name."""
    chosen: dict[str, list[str]] = {name: [] for name in names}
    for override in overrides:
        head = _head(override)
        rest = override.removeprefix(f"{head}.")
        if head in chosen and rest != override:
            chosen[head].append(rest)
        elif head in RunConfig.model_fields and head not in _OWN_KEYS:
            for items in chosen.values():
                items.append(override)
        elif head not in _OWN_KEYS:
            allowed = [*names, *_OWN_KEYS, *RunConfig.model_fields]
            hint = nearest(head, list(dict.fromkeys(allowed)))
            raise UserError(f"override {override!r}: names no stage and no key; {hint}")
    return chosen


def _head(override: str) -> str:
    """The first key of ``a.b=value``."""
    return override.partition("=")[0].partition(".")[0]


def _override(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


@contextmanager
def _naming(place: str) -> Iterator[None]:
    """Say of a mistake which stage it is in."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


# ------------------------------------------------------------------ checks before the first stage


def describe(plan: Plan) -> list[tuple[str, list[tuple[str, str]]]]:
    """Derived counts of every stage and of all together, as titles with (what, value) lines."""
    tables = [(stage.name, describe_stage(stage)) for stage in plan.stages]
    sizes = [stage.config.training for stage in plan.stages]
    updates = [size.num_steps * size.num_epochs * size.updates_per_epoch for size in sizes]
    samples = [size.num_steps * size.prompts_per_step * size.group_size for size in sizes]
    total = {
        "stages": len(sizes),
        "steps": sum(size.num_steps for size in sizes),
        "optimizer steps": sum(updates),
        "samples in all": sum(samples),
    }
    return [*tables, ("all stages", [(name, str(value)) for name, value in total.items()])]


def describe_stage(stage: Stage) -> list[tuple[str, str]]:
    """As ``preflight.describe``; what needs files of a stage that has not trained is put off.

    A mistake that names the folder of an earlier stage can only be judged once that has trained:
    the run itself checks everything again when its turn comes.
    """
    with _naming(f"stage {stage.name!r}"):
        try:
            return preflight.describe(stage.config)
        except UserError as error:
            missing = [n for n, run in stage.needs.items() if not steps_of(run)]
            if not any(str(stage.needs[name]) in str(error) for name in missing):
                raise
    folder = str(stage.config.run_dir)
    return [("run folder", folder), ("checked later", f"needs what {', '.join(missing)} makes")]


def refuse(plan: Plan, *, resume: bool, finished: Iterable[str] = ()) -> None:
    """``UserError`` for whatever can be known to fail before the first stage starts."""
    from mmrl import runner  # loads accelerate, for which `mmrl check` need not wait

    if not resume:
        preflight.refuse_foreign_folder(plan.folder, resume)
    for stage in plan.stages:
        run = stage.config.run_dir
        with _naming(f"stage {stage.name!r}"):
            preflight.refuse_foreign_folder(run, resume)
            runner.tracking_options(stage.config.tracking.trackers, run)
            runner.resume_point(stage.config)
        if stage.name not in finished:
            describe_stage(stage)
        moving = [name for name in stage.needs if name not in finished and steps_of(run)]
        if moving:
            raise UserError(
                f"stage {stage.name!r} in {run} began from {', '.join(moving)}, which would train "
                "on; choose a new folder with output_dir=... or name=..."
            )


# ------------------------------------------------------------------ training


def train(
    plan: Plan, *, resume: bool, main: bool, announce: Callable[[str], None]
) -> list[Summary]:
    """Train every stage that is not finished, in order; a summary of each stage.

    ``main``: whether this process writes ``stages.json`` and ``stages.html`` into the folder of the
    plan.  Raises what training raises, after what it has cost is written down.
    """
    spent = read_record(plan.folder) if resume else {}
    done = {s.name for s in plan.stages if is_finished(s, spent.get(s.name, Spent()))}
    refuse(plan, resume=resume, finished=done)

    def note(stage: Stage, cost: Spent) -> None:
        spent[stage.name] = spent.get(stage.name, Spent()) + cost
        if main:
            write_record(plan, spent)

    with one_group_of_processes():
        for number, stage in enumerate(plan.stages, start=1):
            title = f"stage {number} of {len(plan.stages)}: {stage.name}"
            announce(f"{title} (finished)" if stage.name in done else title)
            if stage.name not in done:
                _train_stage(stage, resume, note)
    summaries = summarise(plan, spent)
    if main:
        _write_report(plan, summaries)
    return summaries


def _train_stage(stage: Stage, resume: bool, note: Callable[[Stage, Spent], None]) -> None:
    """Train one stage; ``note`` is told what it has cost, however it ends."""
    from mmrl import runner

    wall, cpu = time.monotonic(), _cpu_seconds()
    try:
        with _naming(f"stage {stage.name!r}"):
            runner.train(stage.config, resume=resume)
    except BaseException:
        # Other processes may be gone, so none is asked: each is taken to have worked as much.
        world = int(os.environ.get("WORLD_SIZE", "1"))
        note(stage, Spent(wall=time.monotonic() - wall, cpu=(_cpu_seconds() - cpu) * world))
        raise
    cpu = sum(gather_object([_cpu_seconds() - cpu]))
    _forget_accelerator()
    note(stage, Spent(wall=time.monotonic() - wall, cpu=cpu, finished=True))


def _cpu_seconds() -> float:
    """User and system time of this process and of its finished children."""
    return sum(os.times()[:4])


def _forget_accelerator() -> None:
    """Let the next stage make an accelerator of its own: precision and launcher state are kept
    once for the whole process, and the wrapped model of the last one must leave memory.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------ what it came to


def steps_of(run: Path) -> int:
    """Finished steps of a run, also of one that does not exist."""
    if not (run / CONFIG).is_file():
        return 0
    return max((int(row["step"]) for row in read_run(run).metrics), default=0)


def is_finished(stage: Stage, spent: Spent) -> bool:
    """Whether a stage came to its end, and to as many steps as are asked for now."""
    return spent.finished and steps_of(stage.config.run_dir) >= stage.config.training.num_steps


def summarise(plan: Plan, spent: Mapping[str, Spent]) -> list[Summary]:
    """A summary of every stage that has begun."""
    begun = [stage for stage in plan.stages if (stage.config.run_dir / CONFIG).is_file()]
    return [
        Summary(
            name=stage.name,
            steps=steps_of(stage.config.run_dir),
            spent=spent.get(stage.name, Spent()),
            changes=before_after(read_run(stage.config.run_dir).metrics),
        )
        for stage in begun
    ]


def total(summaries: Sequence[Summary]) -> Summary:
    """Steps and costs of all stages together."""
    spent = [summary.spent for summary in summaries]
    return Summary(
        name="all stages",
        steps=sum(summary.steps for summary in summaries),
        spent=Spent(
            wall=sum(s.wall for s in spent),
            cpu=sum(s.cpu for s in spent),
            finished=all(s.finished for s in spent),
        ),
    )


def table_rows(summaries: Sequence[Summary]) -> list[list[str]]:
    """Cells under ``HEAD``: a line for each metric of each stage, and one of totals."""
    from mmrl.report import number

    rows = []
    for summary in [*summaries, total(summaries)]:
        costs = [summary.name, str(summary.steps)]
        costs += [f"{seconds:.1f}" for seconds in (summary.spent.wall, summary.spent.cpu)]
        results = [[c.name, number(c.before), number(c.after)] for c in summary.changes]
        for i, result in enumerate(results or [[""] * 3]):
            rows.append([*(costs if i == 0 else [""] * len(costs)), *result])
    return rows


def read_record(folder: Path) -> dict[str, Spent]:
    """What the stages of an earlier start have cost, by name."""
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["stages"]
        return {
            entry["name"]: Spent(
                wall=float(entry["wall_seconds"]),
                cpu=float(entry["cpu_seconds"]),
                finished=bool(entry["finished"]),
            )
            for entry in entries
        }
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from None


def write_record(plan: Plan, spent: Mapping[str, Spent]) -> None:
    """Write ``stages.json``; a kill at this moment leaves the old one."""
    summaries = summarise(plan, spent)
    record = {
        "name": plan.name,
        "stages": [_entry(summary) for summary in summaries],
        "total": _entry(total(summaries)),
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    temporary = plan.folder / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(plan.folder / RECORD)


def _entry(summary: Summary) -> dict[str, Any]:
    return {
        "name": summary.name,
        "finished": summary.spent.finished,
        "steps": summary.steps,
        "wall_seconds": round(summary.spent.wall, 3),
        "cpu_seconds": round(summary.spent.cpu, 3),
        "held_out": {c.name: {"before": c.before, "after": c.after} for c in summary.changes},
    }


def _write_report(plan: Plan, summaries: Sequence[Summary]) -> None:
    from mmrl.report import write_stages

    runs = [stage.config.run_dir for stage in plan.stages]
    write_stages(plan.name, HEAD, table_rows(summaries), runs, plan.folder / REPORT)
