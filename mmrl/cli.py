"""The command line: ``mmrl train``, ``check``, ``eval``, ``sample``, ``report``, ``compare``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from mmrl.errors import UserError
from mmrl.run_folder import CONFIG, Change, before_after, read_run

if TYPE_CHECKING:
    from mmrl.config import RunConfig

USER_MISTAKE, FAILED_CHECK, INTERRUPTED = 2, 1, 130

ConfigFile = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="YAML file of a run, see configs/quickstart.yaml, or of several runs, with `stages`.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Settings that replace those of the file, such as training.num_steps=10 or "
        "rewards.0.weight=2; with stages, of all of them, or STAGE.KEY=VALUE of one.",
    ),
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]


class Commands(TyperGroup):
    """Turns what users can put right into one message and an exit code, for every command."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; exit 2 for a user's mistake and 130 for an interruption."""
        try:
            return super().invoke(ctx)
        except (UserError, ValidationError) as error:
            _complain("error", _message(error))
            raise typer.Exit(USER_MISTAKE) from None
        except KeyboardInterrupt as interruption:
            # The training loop says here what was saved.
            _complain("interrupted", str(interruption) or "nothing was saved")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    help="RL fine-tuning of generative models.",
    epilog="Start with: mmrl train configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    # An unexpected exception is a bug: its plain traceback belongs in the report of it.
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of ``mmrl``, ``python -m mmrl`` and ``accelerate launch -m mmrl``."""
    app(prog_name="mmrl")


@app.command(epilog="Example: mmrl train configs/quickstart.yaml seed=1 name=second")
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint of the run folder.")
    ] = False,
) -> None:
    """Train a model; ends with a table of held-out results and a run folder with a report.

    A file with `stages` trains one run after another, such as teachers and their student; what is
    finished is not trained again with [bold]--resume[/].

    Prefix it with [bold]accelerate launch -m[/] to use several processes or GPUs.
    """
    if _has_stages(config):
        return _train_stages(config, overrides, resume)
    loaded = _load(config, overrides)
    from mmrl.runner import train as run_training

    run = run_training(loaded, resume=resume)
    console = _console()
    changes = before_after(read_run(run).metrics)
    if changes:
        console.print(results_table(changes))
    console.print(f"Report: {run / 'report.html'}", soft_wrap=True)


@app.command(epilog="Example: mmrl check configs/quickstart.yaml training.group_size=16")
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate a configuration, or that of every stage, and print what it amounts to.

    Loads no weights.
    """
    if _has_stages(config):
        from mmrl import stages

        tables = stages.describe(stages.load(config, overrides or []))
    else:
        loaded = _load(config, overrides)
        from mmrl.preflight import describe

        tables = [(loaded.name, describe(loaded))]
    console = _console()
    for title, lines in tables:
        table = _table("", "", title=title, show_header=False)
        for name, value in lines:
            table.add_row(name, value)
        console.print(table)
    console.print(f"{config}: valid", style="green")


@app.command("eval", epilog="Example: mmrl eval runs/quickstart evaluation.samples_per_prompt=16")
def evaluate(
    target: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_OR_CONFIG",
            help="A run folder (its last checkpoint) or a YAML file (the model before training).",
        ),
    ],
    overrides: Overrides = None,
) -> None:
    """Score weights on the held-out prompts; a run also gets a file eval-TIME.json."""
    run = target if target.is_dir() else None
    if run is not None:
        read_run(run)
    loaded = _load(run / CONFIG if run else target, overrides)
    from mmrl.runner import evaluate as run_evaluation

    values = run_evaluation(loaded, run=run)
    console = _console()
    console.print(values_table(values))
    if run is not None and is_main_process():
        out = run / f"eval-{datetime.now():%Y%m%d-%H%M%S}.json"
        record = {"overrides": overrides or [], "values": values}
        out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written: {out}", soft_wrap=True)


@app.command(
    epilog="Example: mmrl sample runs/quickstart --prompt 'a red sign \"42\"' --count 8 --out signs"
)
def sample(
    run: RunArgument,
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to ask for; repeatable.")],
    count: Annotated[int, typer.Option(min=1, help="Samples of each prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the samples.")] = Path("samples"),
) -> None:
    """Sample with the trained weights: a PNG for each image and grid.png, or completions.jsonl."""
    read_run(run)
    from mmrl.runner import sample as run_sampling

    samples = run_sampling(run, prompt, count=count, seed=seed)
    if is_main_process():
        written = save_samples(samples, prompt, out)
        _console().print(f"Written: {written}, {len(prompt) * count} samples", soft_wrap=True)


@app.command(epilog="Example: mmrl report runs/quickstart")
def report(run: RunArgument) -> None:
    """Write RUN/report.html again from what the run folder holds, also for an unfinished run."""
    from mmrl.report import write_report

    if is_main_process():
        _console().print(f"Written: {write_report(run)}", soft_wrap=True)


@app.command(epilog="Example: mmrl compare runs/first runs/second --out compare.html")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Two run folders or more.")],
    out: Annotated[Path, typer.Option(help="Where the page is written.")] = Path("compare.html"),
) -> None:
    """Curves, results, samples and differing settings of several runs side by side."""
    if len(runs) < 2:
        raise UserError(f"compare needs two run folders or more, got {len(runs)}")
    from mmrl.report import write_comparison

    if is_main_process():
        console = _console()
        console.print(comparison_table(runs))
        console.print(f"Written: {write_comparison(runs, out)}", soft_wrap=True)


@app.command("list", epilog="Example: mmrl list rewards")
def list_parts(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND",
            help="objectives, advantages, modulators, selection, regularisers, corrections, "
            "samplers, budgets, rewards, models, vision_models or backends; all without it.",
        ),
    ] = None,
) -> None:
    """The parts a configuration can name: what each does and needs, and its paper.

    Behind the paper: whether the formula was read in code, in the paper, or reconstructed.
    """
    from mmrl import listing
    from mmrl.resolve import KINDS, entries

    console = _console()
    for each in [kind] if kind else [*KINDS, "backends"]:
        asking = each in listing.KINDS
        columns = ["needs", "runs on"] if asking else []
        table = _table("name", "what it does", *columns, "paper", title=each)
        for entry in entries(each):
            evidence = f" ({entry.evidence})" if entry.evidence else ""
            asked = [f(each, entry.name) for f in (listing.requirements, listing.runs_on) if asking]
            cells = [entry.summary, *asked, entry.paper + evidence]
            table.add_row(Text(entry.name, style="bold"), *map(Text, cells))
        console.print(table)


@app.command(epilog="Example: mmrl doctor")
def doctor() -> None:
    """What works on this machine: versions, devices, dtypes, attention kernels, OCR."""
    from mmrl.doctor import examine

    console = _console()
    marks = {"ok": ("ok", "green"), "note": ("--", "yellow"), "fail": ("FAIL", "red")}
    failed = 0
    for result in examine():
        mark, style = marks[result.status]
        line = Text.assemble((f"{mark:>4}  ", style), f"{result.topic:<28} {result.detail}")
        console.print(line, soft_wrap=True)
        failed += result.status == "fail"
    if failed:
        _complain("error", f"{failed} of the checks failed")
        raise typer.Exit(FAILED_CHECK)


def stages_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Steps, costs and held-out results of each stage and of all, for the terminal."""
    table = _table(title="Stages")
    for name in head:
        table.add_column(name, justify="left" if name in ("stage", "held-out metric") else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def results_table(changes: Sequence[Change]) -> Table:
    """Before, after and best of each evaluation metric, for the terminal."""
    from mmrl.report import number

    table = _table("held-out metric", title="Before and after")
    for column in ("before", "after", "change", "best"):
        table.add_column(column, justify="right")
    for c in changes:
        cells = (number(c.before), number(c.after), number(c.change, sign=True), number(c.best))
        table.add_row(Text(c.name), *cells)
    return table


def values_table(values: Mapping[str, float]) -> Table:
    """Names and values of one evaluation, for the terminal."""
    from mmrl.report import number

    table = _table("held-out metric")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(Text(name), number(value))
    return table


def comparison_table(runs: Sequence[Path]) -> Table:
    """The last value of each evaluation metric in every run, for the terminal."""
    from mmrl.report import comparison_rows, labels, number

    folders = [read_run(run) for run in runs]
    table = _table("held-out metric")
    for label in labels(folders):
        table.add_column(Text(label), justify="right")
    for name, changes in comparison_rows(folders).items():
        cells = [None if c is None else c.before if c.after is None else c.after for c in changes]
        table.add_row(Text(name), *(number(value) for value in cells))
    return table


def save_samples(images: Sequence[Sequence[Any]], prompts: Sequence[str], out: Path) -> Path:
    """Write ``PROMPT-SAMPLE.png`` for every image (numbers from 0) and ``grid.png``.

    Of texts ``completions.jsonl``.  Returns the file that shows all of them.
    """
    from mmrl.images import labelled_grid
    from mmrl.runner import write_texts

    out.mkdir(parents=True, exist_ok=True)
    if isinstance(images[0][0], str):
        write_texts(out / "completions.jsonl", prompts, images)
        return out / "completions.jsonl"
    for i, row in enumerate(images):
        for j, image in enumerate(row):
            image.save(out / f"{i:03d}-{j:03d}.png")
    labelled_grid(images, prompts).save(out / "grid.png")
    return out / "grid.png"


def is_main_process() -> bool:
    """Whether this is the one process that prints and writes."""
    return _rank() == 0


def _rank() -> int:
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def _table(*columns: str, title: str | None = None, show_header: bool = True) -> Table:
    return Table(
        *columns, title=title, title_justify="left", show_header=show_header, box=box.SIMPLE_HEAD
    )


def _console() -> Console:
    # Made when needed, so that it writes to the standard output of the moment.
    return Console(quiet=not is_main_process(), highlight=False)


def _load(path: Path, overrides: Sequence[str] | None) -> RunConfig:
    from mmrl.config import load

    return load(path, overrides or [])


def _has_stages(path: Path) -> bool:
    from mmrl.config import read_yaml
    from mmrl.stages import is_stages_file

    return is_stages_file(read_yaml(path))


def _train_stages(path: Path, overrides: Sequence[str] | None, resume: bool) -> None:
    from mmrl import stages

    plan, console = stages.load(path, overrides or []), _console()
    summaries = stages.train(
        plan, resume=resume, main=is_main_process(), announce=lambda text: console.print(Text(text))
    )
    console.print(stages_table(stages.HEAD, stages.table_rows(summaries)))
    console.print(f"Report: {plan.folder / stages.REPORT}", soft_wrap=True)


def _message(error: UserError | ValidationError) -> str:
    if isinstance(error, UserError):
        return str(error)
    lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    return "\n".join(lines)


def _complain(label: str, message: str) -> None:
    """On standard error from every process: a mistake may show on one of them only."""
    where = "" if is_main_process() else f"[process {_rank()}] "
    line = Text.assemble(where, (f"{label}: ", "bold red"), message)
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)
