"""A run, or several side by side, as one HTML file that needs neither network nor scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from mmrl.run_folder import (
    Change,
    Row,
    RunFolder,
    before_after,
    evaluations,
    flatten,
    is_finite,
    read_metrics,
    read_rows,
    read_run,
    training_curves,
)

__all__ = ["before_after", "read_metrics", "write_comparison", "write_report"]

MAX_GRIDS = 12
"""Sample grids embedded in a report, spread evenly and including the first and the last."""
MAX_COMPLETIONS = 6
"""Prompts of a step whose completions are shown in a report."""
MAX_THUMBNAIL = 256
"""Pixels of the longer side of a prompt's picture."""
MAX_PNG_BYTES = 400_000
"""Larger pictures are embedded as JPEG."""


@dataclass(frozen=True)
class Panel:
    """One chart of training metrics: those of ``keys`` that the run logged."""

    title: str
    note: str
    keys: tuple[str, ...]
    log_scale: bool = False


PANELS = (
    Panel("Policy ratio", "New over old probability: 1 when strictly on-policy.", ("ratio/mean",)),
    Panel(
        "Clipped share",
        "Share of decisions whose gradient the clip removes.",
        ("clip_ratio/region", "clip_ratio/low", "clip_ratio/high"),
    ),
    Panel(
        "Distance to the reference",
        "How far the policy has moved; a run-away curve means over-optimisation.",
        ("kl_reference", "kl_ema", "approx_kl"),
    ),
    Panel(
        "Velocity norm",
        "Mean square of the prediction over that of the reference; growth is over-optimisation.",
        ("velocity_norm_ratio",),
    ),
    Panel("Loss", "Its level means little: advantages are centred.", ("loss",)),
    Panel("Gradient norm", "Before clipping, logarithmic.", ("grad_norm",), log_scale=True),
    Panel(
        "Groups without a signal",
        "Share of prompts whose samples all earned the same reward.",
        ("frac_reward_zero_std",),
    ),
    Panel(
        "Lost work",
        "Samples without a usable reward and skipped updates: both should stay at 0.",
        ("invalid_samples", "bad_updates"),
    ),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel(
        "Seconds per step",
        "Where the time goes. Rewards overlap with the rollout.",
        ("time/rollout", "time/reward", "time/update", "step_time"),
    ),
)


def write_report(run: Path) -> Path:
    """Write ``report.html`` into the run folder and return its path; parts may be missing.

    Raises ``UserError`` if ``run`` is not a run folder.
    """
    folder = read_run(run)
    sections = [
        _header(folder),
        _section("Before and after", _results(folder) + _first_and_last(folder)),
        _section("Learning curves", _learning_curves(folder.metrics)),
        _section("Completions in training", _pair_of_completions(folder.trained)),
        _section("Diagnostics", _diagnostics(folder.metrics)),
        _section("Samples by step", _all_samples(folder)),
        _section("Configuration", _yaml_block(folder.config)),
        _section("Environment", _environment(folder.environment)),
    ]
    out = run / "report.html"
    out.write_text(_page(folder.name, sections), encoding="utf-8")
    return out


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Write one page with the results, curves, last samples and differing settings of ``runs``.

    Raises ``UserError`` if one of them is not a run folder.
    """
    folders = [read_run(run) for run in runs]
    names = labels(folders)
    sections = [
        f"<header><h1>{len(folders)} runs compared</h1><p>{_text(', '.join(names))}</p></header>",
        _section("Results", _comparison_table(folders, names)),
        _section("Curves", _comparison_curves(folders, names)),
        _section("Last samples", _last_samples(folders, names)),
        _section("Settings that differ", _differences(folders, names)),
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(_page("Comparison", sections), encoding="utf-8")
    return out


def write_stages(
    name: str, head: Sequence[str], rows: Sequence[Sequence[str]], runs: Sequence[Path], out: Path
) -> Path:
    """Write one page for runs that followed each other: the table ``rows``, curves and samples.

    ``runs`` are in the folder of ``out``, each with a report of its own, which the page links.
    """
    folders = [read_run(run) for run in runs]
    names = [run.name for run in runs]
    links = ", ".join(f'<a href="{_text(n)}/report.html">{_text(n)}</a>' for n in names)
    sections = [
        f"<header><h1>{_text(name)}</h1><p>Reports of the stages: {links}</p></header>",
        _section("Costs and results", _table(head, rows)),
        _section("Curves", _comparison_curves(folders, names)),
        _section("Last samples", _last_samples(folders, names)),
        _section("Settings that differ", _differences(folders, names)),
    ]
    out.write_text(_page(name, sections), encoding="utf-8")
    return out


def labels(folders: Sequence[RunFolder]) -> list[str]:
    """A distinct name for each run: the configured one, or its path where two share it."""
    names = [folder.name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder.path)
        for name, folder in zip(names, folders, strict=True)
    ]


def comparison_rows(folders: Sequence[RunFolder]) -> dict[str, list[Change | None]]:
    """For each evaluation metric the change in every run, ``None`` where it was not measured."""
    changes = [{c.name: c for c in before_after(folder.metrics)} for folder in folders]
    names = dict.fromkeys(name for by_name in changes for name in by_name)
    return {name: [by_name.get(name) for by_name in changes] for name in names}


def number(value: float | None, *, sign: bool = False) -> str:
    """A value with three decimals, very large or small ones in short form; a dash for none."""
    if value is None or not is_finite(value):
        return "\u2013"
    plain = value == 0 or 1e-3 <= abs(value) < 1e5
    return f"{value:{'+' if sign else ''}{'.3f' if plain else '.3g'}}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds in words, such as ``3 min 42 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# ------------------------------------------------------------------ a single run


def _header(folder: RunFolder) -> str:
    facts = "".join(f"<li><span>{_text(k)}</span>{_text(v)}</li>" for k, v in _facts(folder))
    return f"<header><h1>{_text(folder.name)}</h1>{_headline(folder)}<ul>{facts}</ul></header>"


def _headline(folder: RunFolder) -> str:
    """The first evaluation metric in one sentence."""
    first = next((c for c in before_after(folder.metrics) if c.after is not None), None)
    if first is None:
        return "<p>No evaluation after training is recorded.</p>"
    return (
        f'<p class="headline"><code>{_text(first.name)}</code> on held-out prompts: '
        f"{number(first.before)} \u2192 <strong>{number(first.after)}</strong></p>"
    )


def _facts(folder: RunFolder) -> list[tuple[str, str]]:
    """Short statements about the run for the top of the page; unknown ones are left out."""
    flat = flatten(folder.config)
    steps = max((int(row["step"]) for row in folder.metrics), default=0)
    times = [row["step_time"] for row in folder.metrics if is_finite(row.get("step_time"))]
    planned = flat.get("training.num_steps")
    facts = {
        "Model": flat.get("backend.model.path"),
        "Objective": flat.get("objective.name"),
        "Steps": f"{steps} of {planned}" if planned else str(steps),
        "Training time": duration(sum(times)) if times else None,
        "Seed": flat.get("seed"),
        "Device": folder.environment.get("device"),
        "Processes": folder.environment.get("processes"),
        "Started": folder.environment.get("started"),
    }
    return [(key, str(value)) for key, value in facts.items() if value is not None]


def _results(folder: RunFolder) -> str:
    changes = before_after(folder.metrics)
    if not changes:
        return '<p class="empty">No evaluation is recorded.</p>'
    head = ("Held-out metric", "Before", "After", "Change", "Best", "at step")
    return _table(head, [_result_cells(change) for change in changes])


def _result_cells(change: Change) -> list[str]:
    return [
        change.name,
        number(change.before),
        number(change.after),
        number(change.change, sign=True),
        number(change.best),
        str(change.best_step),
    ]


def _first_and_last(folder: RunFolder) -> str:
    if folder.held_out:
        return _pair_of_completions(folder.held_out)
    steps = list(folder.samples)
    if len(steps) < 2:
        return ""
    figures = [_figure(folder.samples[s], f"Step {s}") for s in (steps[0], steps[-1])]
    note = '<p class="note">The same prompts and the same noise, before and after training.</p>'
    return f'{note}<div class="pair">{"".join(figures)}</div>'


def _pair_of_completions(files: Mapping[int, Path]) -> str:
    """Of the first and the last step, one completion of each prompt, with its rewards."""
    figures = []
    for step in dict.fromkeys([*files][:1] + [*files][-1:]):
        rows: dict[str, Mapping[str, Any]] = {}
        for row in read_rows(files[step]):
            rows.setdefault(row["prompt"], row)
        shown = [_completion(row) for row in [*rows.values()][:MAX_COMPLETIONS]]
        note = f"The first completions of {len(shown)} of {len(rows)} prompts in {files[step].name}"
        figures.append(
            f"<figure><figcaption>Step {step}</figcaption>"
            f'<dl class="texts">{"".join(shown)}</dl><p class="note">{_text(note)}</p></figure>'
        )
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""


def _completion(row: Mapping[str, Any]) -> str:
    pictures = "".join(
        f'<img alt="" src="{_thumbnail(entry["bytes"])}">'
        for value in row.values()
        if isinstance(value, list)  # pictures alone are lists
        for entry in value
    )
    names = [name for name in row if name.startswith("rewards/") or name in ("reward", "advantage")]
    numbers = ", ".join(f"{name.removeprefix('rewards/')} {number(row[name])}" for name in names)
    return (
        f"<dt>{pictures}{_text(row['prompt'])}</dt><dd>{_text(row['completion'])}</dd>"
        f'<dd class="numbers">{_text(numbers)}</dd>'
    )


def _learning_curves(metrics: Sequence[Row]) -> str:
    curves = training_curves(metrics)
    by_step = evaluations(metrics)
    charts = [_reward_chart(curves)] if "reward" in curves else []
    for name in dict.fromkeys(key for values in by_step.values() for key in values):
        points = {step: values[name] for step, values in by_step.items() if name in values}
        series = _series(name, list(points), list(points.values()))
        charts.append(_chart(f"Held-out {name}", "", [series], markers=True))
    names = [key for key in curves if key.startswith("rewards/") and key.endswith("/mean")]
    if len(names) > 1:
        series = [_series(key.split("/")[1], *curves[key]) for key in names]
        charts.append(_chart("Training reward by judge", "", series))
    return _grid(charts)


def _reward_chart(curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    steps, values = curves["reward"]
    spread = dict(zip(*curves.get("reward_std", ([], [])), strict=True))
    band = [spread.get(step, 0.0) for step in steps] if spread else []
    note = "Mean of the training samples" + ("; band: standard deviation." if band else ".")
    return _chart("Training reward", note, [_series("reward", steps, values, band)])


def _diagnostics(metrics: Sequence[Row]) -> str:
    curves = training_curves(metrics)
    charts = [_panel(panel, curves) for panel in PANELS if set(panel.keys) & set(curves)]
    shown = {key for panel in PANELS for key in panel.keys} | {"reward"}
    rest = [key for key in curves if key not in shown and len(curves[key][0]) > 1]
    others = [_chart(key, "", [_series(key, *curves[key])]) for key in rest]
    more = _details(f"All other metrics ({len(others)})", _grid(others)) if others else ""
    return _grid(charts) + more


def _panel(panel: Panel, curves: Mapping[str, tuple[list[int], list[float]]]) -> str:
    series = [_series(key, *curves[key]) for key in panel.keys if key in curves]
    positive = all(value > 0 for item in series for value in item.values)
    return _chart(panel.title, panel.note, series, log_scale=panel.log_scale and positive)


def _all_samples(folder: RunFolder) -> str:
    steps = evenly_spread(list(folder.samples), MAX_GRIDS)
    if not steps:
        return '<p class="empty">No sample grids are recorded.</p>'
    return "".join(_details(f"Step {s}", _figure(folder.samples[s], f"Step {s}")) for s in steps)


def evenly_spread(items: Sequence[int], count: int) -> list[int]:
    """At most ``count`` (two or more) of ``items``, evenly spaced, first and last included."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _environment(environment: Mapping[str, Any]) -> str:
    if not environment:
        return '<p class="empty">No environment is recorded.</p>'
    command = environment.get("command")
    flat = flatten(dict(environment) | ({"command": " ".join(command)} if command else {}))
    return _table(("", ""), [[key, str(value)] for key, value in flat.items()])


# ------------------------------------------------------------------ several runs


def _comparison_table(folders: Sequence[RunFolder], names: Sequence[str]) -> str:
    rows = [
        [metric, *(_arrow(change) for change in changes)]
        for metric, changes in comparison_rows(folders).items()
    ]
    if not rows:
        return '<p class="empty">No evaluation is recorded.</p>'
    return _table(("Held-out metric, before \u2192 after", *names), rows)


def _arrow(change: Change | None) -> str:
    if change is None:
        return number(None)
    return f"{number(change.before)} \u2192 {number(change.after)}"


def _comparison_curves(folders: Sequence[RunFolder], names: Sequence[str]) -> str:
    charts = []
    for metric in comparison_rows(folders):
        series = []
        for folder, name in zip(folders, names, strict=True):
            by_step = evaluations(folder.metrics)
            points = {step: values[metric] for step, values in by_step.items() if metric in values}
            series.append(_series(name, list(points), list(points.values())))
        charts.append(_chart(f"Held-out {metric}", "", series, markers=True))
    all_curves = [training_curves(folder.metrics) for folder in folders]
    for key in ("reward", "kl_reference", "grad_norm", "step_time"):
        pairs = zip(names, all_curves, strict=True)
        series = [_series(name, *curves[key]) for name, curves in pairs if key in curves]
        charts += [_chart(key, "", series)] if series else []
    return _grid(charts)


def _last_samples(folders: Sequence[RunFolder], names: Sequence[str]) -> str:
    last = [
        _figure(folder.samples[max(folder.samples)], f"{name}, step {max(folder.samples)}")
        for folder, name in zip(folders, names, strict=True)
        if folder.samples
    ]
    return f'<div class="pair">{"".join(last)}</div>' if last else ""


def _differences(folders: Sequence[RunFolder], names: Sequence[str]) -> str:
    flats = [flatten(folder.config) for folder in folders]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    rows = [[key, *(str(flat.get(key, "\u2013")) for flat in flats)] for key in keys]
    different = [row for row in rows if len(set(row[1:])) > 1]
    if not different:
        return '<p class="empty">None.</p>'
    return _table(("Key", *names), different)


# ------------------------------------------------------------------ pieces of HTML


def _series(label: str, steps: Sequence[int], values: Sequence[float], band=()):
    from mmrl.charts import Series

    return Series(label=label, steps=steps, values=values, band=band)


def _chart(title: str, note: str, series: Sequence[Any], **options: bool) -> str:
    # Drawing loads matplotlib, which commands that only read a run need not wait for.
    from mmrl.charts import line_chart

    caption = f"<p>{_text(note)}</p>" if note else ""
    drawing = line_chart(series, title, **options)
    return f'<figure class="chart"><h3>{_text(title)}</h3>{caption}{drawing}</figure>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>" if body else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{body}</details>"


def _grid(charts: Iterable[str]) -> str:
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    header = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    return f'<div class="scroll"><table>{header}<tbody>{body}</tbody></table></div>'


def _yaml_block(config: Mapping[str, Any]) -> str:
    if not config:
        return '<p class="empty">No configuration is recorded.</p>'
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return _details("Resolved configuration (config.yaml)", f"<pre>{_text(text)}</pre>")


def _figure(path: Path, caption: str) -> str:
    label = _text(caption)
    if path.suffix == ".png":
        content = f'<img alt="{label}" src="{_embed(path)}">'
    else:
        content = _completions(path)
    return f"<figure><figcaption>{label}</figcaption>{content}</figure>"


def _completions(path: Path) -> str:
    """Each prompt with its first completion, and how many more the file has."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    shown = [
        f"<dt>{_text(row['prompt'])}</dt><dd>{_text(row['completions'][0])}</dd>"
        for row in rows
        if row["completions"]
    ]
    note = f'<p class="note">First completions; all are in samples/{_text(path.name)}.</p>'
    return f'<dl class="texts">{"".join(shown)}</dl>{note}'


def _thumbnail(data: bytes) -> str:
    """A small picture as a ``data:`` address."""
    image, buffer = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
    image.thumbnail((MAX_THUMBNAIL, MAX_THUMBNAIL))
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _embed(path: Path) -> str:
    """The picture as a ``data:`` address."""
    data, kind = path.read_bytes(), "png"
    if len(data) > MAX_PNG_BYTES:
        buffer = io.BytesIO()
        Image.open(path).convert("RGB").save(buffer, format="JPEG", quality=88)
        data, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _text(value: str) -> str:
    return escape(value, quote=True)


def _page(title: str, sections: Iterable[str]) -> str:
    style = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>"
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )
