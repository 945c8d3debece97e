"""Putting a run together: train it, evaluate it, draw from it.

Everything above the loop of ``trainer``: the run folder, checkpoints and resuming, evaluation,
progress, signals and the final export.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import set_seed

from mmrl import checkpoint, preflight
from mmrl.backend import Backend
from mmrl.completions import CompletionFiles, drop_after
from mmrl.config import RunConfig, parse, read_yaml
from mmrl.distributed import any_process, leave, make_accelerator
from mmrl.errors import UserError
from mmrl.evaluation import EVALUATION_STREAM, Evaluation, evaluate_held_out
from mmrl.metrics import MetricsFile
from mmrl.needs import needs_of_run
from mmrl.progress import Display, make_display
from mmrl.prompts.dataset import content_id
from mmrl.replay_gaps import gap_line
from mmrl.resolve import backend_module
from mmrl.rollouts import Trainable, make_requests
from mmrl.run_folder import COMPLETIONS, flatten
from mmrl.sharding import part_of
from mmrl.stale import Stale
from mmrl.trainer import Trainer
from mmrl.types import Advantages, Prompt
from mmrl.zero import clip_inside_zero, torch_optimizer, uses_zero
from rewards.combine import Scorer

PACKAGES = (
    "mmrl", "torch", "diffusers", "transformers", "accelerate", "peft", "rapidocr", "onnxruntime"
)  # fmt: skip
# May differ between a run and its continuation: they change how long and where, not what.
RESUMABLE = ("output_dir", "training.num_steps", "training.micro_batch_size", "checkpoint.",
             "tracking.", "evaluation.")  # fmt: skip


@dataclass(kw_only=True)
class Session:
    """The live objects of a run on this process."""

    config: RunConfig
    accelerator: Accelerator
    backend: Backend
    training_prompts: Sequence[Prompt]
    evaluation_prompts: Sequence[Prompt]

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.accelerator.is_main_process


def open_session(
    config: RunConfig, extra: Sequence[Prompt] = (), *, trains: bool = True, **options: Any
) -> Session:
    """Check the configuration, then load the model; cheap refusals come before slow loading.

    ``extra``: prompts beside those of the configuration.  Without ``trains`` the backend only
    draws, and holds nothing of what a loss compares the policy with.
    """
    preflight.refuse_unless_consistent(config)
    training, evaluation = preflight.load_prompt_sets(config)
    section = config.backend.config
    accelerator = make_accelerator(section.mixed_precision, **options)  # type: ignore[attr-defined]
    set_seed(config.seed)
    backend = backend_module(config.backend.name, "backend").build(
        section,
        device=accelerator.device,
        prompts=[*training, *evaluation, *extra],
        seed=config.seed,
        needs=needs_of_run(config) if trains else frozenset(),
    )
    return Session(
        config=config,
        accelerator=accelerator,
        backend=backend,
        training_prompts=training,
        evaluation_prompts=evaluation,
    )


def train(config: RunConfig, *, resume: bool = False) -> Path:
    """Train to the end, or to an interruption that is saved; returns the run folder."""
    run = config.run_dir
    preflight.refuse_foreign_folder(run, resume)
    accelerator, steps = _train(config, resume)
    leave(accelerator)
    if steps < config.training.num_steps:
        raise KeyboardInterrupt(f"saved step {steps}; continue with --resume")
    if accelerator.is_main_process:
        _close_folder(run)
    return run


def _train(config: RunConfig, resume: bool) -> tuple[Accelerator, int]:
    """All of a run but its end; with the number of steps it has now."""
    run = config.run_dir
    start = resume_point(config) if resume else None
    trackers = config.tracking.trackers
    options = tracking_options(trackers, run)
    session = open_session(config, **options)
    trainer = make_trainer(session)
    untouched = _fingerprint(session.backend)
    if start is not None:
        trainer.progress, auxiliary = checkpoint.load(
            start, session.accelerator, _trained(session, trainer)
        )
        session.backend.load_auxiliary_state(auxiliary)
    steps = trainer.progress.step
    # Before the first step everything is done again, its evaluation too: nothing is kept.
    metrics = _open_folder(session, steps or None)
    with ExitStack() as stack:
        stack.callback(trainer.scorer.close)
        if metrics is not None:
            stack.callback(metrics.close)
        display = stack.enter_context(make_display(config, session.main))
        interrupted = stack.enter_context(_interruptible())
        display.note(f"resuming after step {steps}" if start else f"run folder: {run}")
        about = preflight.prompt_notes(config, session.training_prompts, session.evaluation_prompts)
        for note in (*about, *session.backend.notes):
            display.note(note)
        loop = Loop(session, trainer, metrics, display, interrupted, saved=steps)
        if loop.run():
            _finish(session, untouched)
    return session.accelerator, trainer.progress.step


@dataclass
class Loop:
    """Steps, evaluations and checkpoints when they are due."""

    session: Session
    trainer: Trainer
    metrics: MetricsFile | None
    display: Display
    interrupted: list[float]
    saved: int

    def __post_init__(self) -> None:
        self.trainer.observe = self._observe

    def run(self) -> bool:
        """Go to the last step; ``False`` if a signal stopped it, after saving."""
        config = self.session.config
        with Scorer(config.evaluation.rewards or config.rewards) as judge:
            return self._run(judge)

    def _run(self, judge: Scorer) -> bool:
        config = self.session.config
        total = config.training.num_steps
        if self.trainer.progress.step == 0:
            self._evaluate(judge)
        while (done := self.trainer.progress.step) < total:
            if any_process(self.session.accelerator, bool(self.interrupted)):
                self._save()
                return False
            checked = self.trainer.replay_gap is not None
            values = self.trainer.step()
            if not checked and self.trainer.replay_gap is not None:
                self.display.note(gap_line(self.trainer.replay_gap))
            done += 1
            self._log(done, values)
            self.display.step(done, values)
            last = done == total
            if last or done % config.evaluation.every == 0:
                self._evaluate(judge)
            if last or done % config.checkpoint.every == 0:
                self._save()
        return True

    def _log(self, step: int, values: dict[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.write(step, values)
        if self.session.config.tracking.trackers:
            self.session.accelerator.log(values, step=step)

    @property
    def _completions(self) -> CompletionFiles:
        config = self.session.config
        return CompletionFiles(
            folder=config.run_dir / COMPLETIONS,
            accelerator=self.session.accelerator,
            # Only language runs have some.
            image_columns=getattr(config.backend.config, "image_columns", ()),
            max_rows=config.tracking.max_completions,
        )

    def _observe(self, rolled: Trainable, advantages: Advantages) -> None:
        config, step = self.session.config, self.trainer.progress.step + 1
        if step in (1, config.training.num_steps) or step % config.tracking.completions_every == 0:
            rank = self.session.accelerator.process_index
            mine = [g for g in rolled.groups if rolled.owners[g.request.index] == rank]
            self._completions.write("step", step, mine, rolled.scores, advantages.values)

    def _evaluate(self, judge: Scorer) -> None:
        session = self.session
        if not session.evaluation_prompts:
            return
        self.display.note("evaluating", transient=True)
        result = evaluate_held_out(
            session.config,
            session.accelerator,
            session.backend,
            session.evaluation_prompts,
            judge,
            self.trainer.moment,
        )
        step = self.trainer.progress.step
        self._log(step, result.metrics)
        self.display.evaluation(step, result.metrics)
        if session.main:
            save_shown(result, session.config.run_dir / "samples", step)
        shown = result.shown if session.main else []
        self._completions.write("eval", step, shown, result.scores)

    def _save(self) -> None:
        progress = self.trainer.progress
        if progress.step == self.saved:
            return
        checkpoint.save(
            self.session.config.run_dir,
            self.session.accelerator,
            _trained(self.session, self.trainer),
            progress,
            self.session.config.checkpoint.keep_last,
        )
        self.saved = progress.step


def evaluate(config: RunConfig, *, run: Path | None = None) -> dict[str, float]:
    """Evaluation metrics of a run's last checkpoint, or of the untrained model of ``config``."""
    if config.evaluation.source is None:
        raise UserError("evaluation.source: required to evaluate, but not set")
    session = open_session(config, trains=False)
    _load_last(session, run)
    with Scorer(config.evaluation.rewards or config.rewards) as judge:
        result = evaluate_held_out(
            config, session.accelerator, session.backend, session.evaluation_prompts, judge
        )
    leave(session.accelerator)
    return result.metrics


def sample(run: Path, prompts: Sequence[str], *, count: int, seed: int) -> list[list[Any]]:
    """``count`` outputs for each prompt from the averaged weights of a run's last checkpoint."""
    config = load_run_config(run)
    wanted = [Prompt(id=content_id(text, {}), text=text) for text in prompts]
    session = open_session(config, wanted, trains=False)
    _load_last(session, run)
    requests = make_requests(wanted, count, seed, EVALUATION_STREAM)
    with session.backend.averaged():
        groups = list(session.backend.rollout(requests, evaluation=True))
    leave(session.accelerator)
    return [list(group.outputs) for group in groups]


def load_run_config(run: Path) -> RunConfig:
    """The configuration that a run folder was made with."""
    path = run / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no config.yaml")
    return parse(read_yaml(path))


def save_shown(result: Evaluation, folder: Path, step: int) -> None:
    """The shown samples as ``step-N``: a labelled picture of pictures, texts in a jsonl file."""
    from PIL import Image

    from mmrl.images import labelled_grid

    path, outputs = folder / f"step-{step:06d}", [group.outputs for group in result.shown]
    labels = [group.request.prompt.text for group in result.shown]
    kinds = {type(output) for row in outputs for output in row}
    if kinds == {str}:
        folder.mkdir(parents=True, exist_ok=True)
        write_texts(path.with_suffix(".jsonl"), labels, outputs)
    elif kinds and all(issubclass(kind, Image.Image) for kind in kinds):
        folder.mkdir(parents=True, exist_ok=True)
        labelled_grid(outputs, labels, title=f"step {step}").save(path.with_suffix(".png"))


def write_texts(path: Path, prompts: Sequence[str], outputs: Sequence[Sequence[str]]) -> None:
    """A line for each prompt, with its completions."""
    lines = [
        json.dumps({"prompt": prompt, "completions": list(row)}, ensure_ascii=False)
        for prompt, row in zip(prompts, outputs, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def environment(processes: int) -> dict[str, Any]:
    """Where a run happens: versions, commit, command, device."""
    cuda = torch.cuda.is_available()
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "device": torch.cuda.get_device_name() if cuda else f"cpu, {os.cpu_count()} cores",
        "processes": processes,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def tracking_options(trackers: Sequence[str], run: Path) -> dict[str, Any]:
    """Arguments of the accelerator; ``UserError`` for a tracker that is not installed."""
    installed = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in trackers:
        if name not in installed:
            raise UserError(
                f"tracking.trackers: {name!r} is not installed here (pip install {name}); "
                f"installed: {', '.join(sorted(installed)) or 'none'}"
            )
    if not trackers:
        return {}
    return {"log_with": list(trackers), "project_dir": str(run / "tensorboard")}


def make_trainer(session: Session) -> Trainer:
    config, accelerator = session.config, session.accelerator
    section = config.optimizer
    parameters = [p for p in session.backend.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
    )
    clip_inside_zero(accelerator, section.max_grad_norm)
    # `prepare` wraps the model for any launcher configuration; the backend uses the wrapped one.
    session.backend.model, prepared = accelerator.prepare(session.backend.model, optimizer)
    training = config.training
    updates = training.num_steps * training.num_epochs * training.updates_per_epoch
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        torch_optimizer(prepared),
        lambda n: _lr_factor(section.schedule, section.warmup_updates, updates, n),
    )
    stale = None
    if training.stale is not None:
        stale = Stale(
            config=config,
            accelerator=accelerator,
            backend=session.backend,
            prompts=session.training_prompts,
        )
    return Trainer(
        config=config,
        accelerator=accelerator,
        backend=session.backend,
        optimizer=prepared,
        scheduler=scheduler,
        prompts=session.training_prompts,
        scorer=Scorer(config.rewards),
        stale=stale,
    )


def _lr_factor(schedule: str, warmup: int, total: int, n: int) -> float:
    """Share of the peak learning rate at update ``n``."""
    if n < warmup:
        return (n + 1) / warmup
    progress = min(1.0, (n - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (
            1.0 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64)))
        )
    return 1.0


def _trained(session: Session, trainer: Trainer) -> checkpoint.Trained:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return checkpoint.Trained(
        model=session.backend.model,
        optimizer=optimizer,
        scheduler=trainer.scheduler,
        auxiliary=session.backend.auxiliary_state(),
        stale=trainer.stale,
    )


def _load_last(session: Session, run: Path | None) -> None:
    if run is None:
        return
    found = checkpoint.found(run)
    if not found:
        raise UserError(f"{run} holds no checkpoint yet")
    if not uses_zero(session.accelerator):  # which wants an optimizer, and there is none
        session.backend.model = session.accelerator.prepare(session.backend.model)
    auxiliary = checkpoint.load_weights(found[-1], session.accelerator, session.backend.model)
    session.backend.load_auxiliary_state(auxiliary)


def resume_point(config: RunConfig) -> Path | None:
    """The newest checkpoint; ``UserError`` if the folder belongs to a different configuration."""
    run = config.run_dir
    if not (run / "config.yaml").is_file():
        return None
    # Through the parser: keys that are newer than the run have their defaults.
    before, now = flatten(load_run_config(run).dump()), flatten(config.dump())
    free = RESUMABLE
    if config.optimizer.schedule != "constant":  # it ends at num_steps
        free = tuple(key for key in RESUMABLE if key != "training.num_steps")
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]
    if changed:
        lines = [f"  {key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed]
        raise UserError(
            f"output_dir: {run} was made with another configuration, so it cannot be resumed:\n"
            + "\n".join(lines)
        )
    found = checkpoint.found(run)
    return found[-1] if found else None


def _open_folder(session: Session, keep_until: int | None) -> MetricsFile | None:
    config, run = session.config, session.config.run_dir
    metrics = None
    if session.main:
        run.mkdir(parents=True, exist_ok=True)
        # A kill in the middle of a save leaves its unfinished folder behind.
        for leftover in run.glob(".checkpoint-*.tmp"):
            shutil.rmtree(leftover)
        dumped = yaml.safe_dump(config.dump(), sort_keys=False, allow_unicode=True)
        (run / "config.yaml").write_text(dumped, encoding="utf-8")
        about = environment(session.accelerator.num_processes)
        record = run / "environment.json"
        if keep_until is not None and record.is_file():
            about["resumed"] = json.loads(record.read_text())
        record.write_text(json.dumps(about, indent=1))
        metrics = MetricsFile(run / "metrics.jsonl", keep_until)
        drop_after(run / COMPLETIONS, -1 if keep_until is None else keep_until)
    session.accelerator.wait_for_everyone()
    if config.tracking.trackers:
        session.accelerator.init_trackers("mmrl", init_kwargs={"wandb": {"name": config.name}})
    return metrics


def _finish(session: Session, untouched: str) -> None:
    """Export the averaged weights; an adapter that never moved is an error, not a result."""
    moved = _fingerprint(session.backend) != untouched
    if not any_process(session.accelerator, moved):
        raise UserError(
            "the trained parameters are identical to the initial ones: nothing was learned "
            "(were all samples invalid, or all advantages zero?)"
        )
    from mmrl.card import model_card

    run = session.config.run_dir
    with session.backend.averaged(), tempfile.TemporaryDirectory() as scratch:
        folder = run / "final" if session.main else Path(scratch)
        session.backend.export(folder, model_card(run) if session.main else "")
    session.accelerator.wait_for_everyone()


def _close_folder(run: Path) -> None:
    from mmrl.report import write_report

    write_report(run)


def _fingerprint(backend: Backend) -> str:
    """A checksum of the trained parameters of this process."""
    total = torch.zeros(2, dtype=torch.float64)
    for p in backend.model.parameters():
        if p.requires_grad:
            x = part_of(p).double().cpu()  # every process looks at its own
            total += torch.stack([x.sum(), (x * torch.arange(x.numel()).view_as(x)).sum()])
    return repr(total.tolist())


@contextmanager
def _interruptible() -> Iterator[list[float]]:
    """Times of SIGINT and SIGTERM; the loop saves after its step. A second Ctrl-C kills."""
    received: list[float] = []

    def handle(number: int, frame: Any) -> None:
        del frame
        now = time.monotonic()
        # Launchers and schedulers repeat signals within moments; a person takes longer.
        if received and number == signal.SIGINT and now - received[0] > 2:
            raise KeyboardInterrupt("nothing was saved since the last checkpoint")
        received.append(now)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Commit of the source tree, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
