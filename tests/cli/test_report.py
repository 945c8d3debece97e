"""The HTML pages: self-contained, escaped, complete, and tolerant of unfinished runs."""

from __future__ import annotations

import base64
import io
import re
import shutil
from html.parser import HTMLParser

import pytest
from PIL import Image
from synthetic_run import CONFIG, METRICS

from mmrl.errors import UserError
from mmrl.report import (
    comparison_rows,
    duration,
    evenly_spread,
    number,
    write_comparison,
    write_report,
)
from mmrl.run_folder import read_run

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags, addresses and text of a page; fails on tags that do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._open += [] if tag in VOID else [tag]
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def parse(path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def assert_self_contained(source: str, page: Page) -> None:
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not page.handlers
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)


def test_report_needs_nothing_else(run):
    out = write_report(run)
    assert out == run / "report.html"
    assert_self_contained(out.read_text(), parse(out))


def test_report_shows_what_happened(run):
    text = parse(write_report(run)).text
    for expected in ("0.250", "0.875", "+0.625", "-0.125", "c0ffee", "9.8.7", "1 min 10 s"):
        assert expected in text, expected
    assert "3 of 3" in text
    assert "mmrl train a file.yaml" in text


def test_report_embeds_the_first_and_last_grid_first(run):
    page = parse(write_report(run))
    pictures = [a for a in page.addresses if a.startswith("data:image/png;base64,")]
    assert len(pictures) == 4, "before and after, then each step"
    colours = [
        Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).getpixel((0, 0))
        for picture in pictures
    ]
    assert colours == [(255, 0, 0), (0, 0, 255)] * 2


def test_every_metric_is_drawn_once(run):
    page = parse(write_report(run))
    titles = [text for text in page.texts if text.startswith("Held-out ")]
    assert titles == ["Held-out metric", "Held-out exact", "Held-out diversity"]
    # reward, two evaluations, gradient norm, seconds, and what no panel claims: reward_std.
    assert page.tags.count("svg") == 6


def test_colours_follow_the_page(run):
    source = write_report(run).read_text()
    assert "var(--ink)" in source
    assert "prefers-color-scheme: dark" in source
    assert "#0102" not in source, "a placeholder colour was left in a chart"


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>&amp;'


def test_text_is_escaped(make_run):
    config = CONFIG | {
        "name": HOSTILE,
        "prompts": {"source": HOSTILE},
        HOSTILE: {HOSTILE: [HOSTILE]},
    }
    metrics = [row | {HOSTILE: 1.0, f"eval/{HOSTILE}": 0.5} for row in METRICS]
    run = make_run("hostile", config=config, metrics=metrics)
    for out in (write_report(run), write_comparison([run, run], run / "compare.html")):
        page = parse(out)
        assert_self_contained(out.read_text(), page)
        assert HOSTILE in page.text


@pytest.mark.parametrize(
    "lost",
    [["samples"], ["metrics.jsonl"], ["config.yaml", "environment.json"], ["environment.json"]],
)
def test_unfinished_runs_have_reports(run, lost):
    for name in lost:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    assert "<h1>signs</h1>" in write_report(run).read_text()


def test_a_run_stopped_before_its_second_evaluation(make_run):
    page = parse(write_report(make_run("short", metrics=METRICS[:2])))
    assert "No evaluation after training is recorded." in page.text
    assert "1 of 3" in page.text
    assert "\u2013" in page.text


def test_many_or_large_grids_stay_small(run):
    noise = Image.effect_noise((900, 900), 80).convert("RGB")
    for step in range(4, 40):
        Image.new("RGB", (4, 4)).save(run / "samples" / f"step-{step:06d}.png")
    noise.save(run / "samples" / "step-000040.png")
    page = parse(write_report(run))
    kinds = [a.split(";")[0] for a in page.addresses if a.startswith("data:")]
    assert len(kinds) == 2 + 12
    assert kinds.count("data:image/jpeg") == 2, "the last grid, shown twice"


def test_evenly_spread():
    assert evenly_spread([], 3) == []
    assert evenly_spread([5, 6, 7], 3) == [5, 6, 7]
    assert evenly_spread(list(range(101)), 5) == [0, 25, 50, 75, 100]
    picked = evenly_spread(list(range(57)), 12)
    assert len(set(picked)) == 12
    assert (picked[0], picked[-1]) == (0, 56)


def test_comparison(run, make_run):
    metrics = [*METRICS[:-1], {"step": 3, "eval/exact": 0.125, "eval/other": 7.0}]
    config = CONFIG | {"name": "second", "training": {"num_steps": 9}}
    other = make_run("second", config=config, metrics=metrics)
    out = write_comparison([run, other], run / "new" / "compare.html")
    page = parse(out)
    assert_self_contained(out.read_text(), page)
    assert "0.250 \u2192 0.875" in page.text
    assert "0.250 \u2192 0.125" in page.text
    assert "7.000 \u2192 \u2013" in page.text
    assert "training.num_steps" in page.texts
    assert "seed" not in page.texts, "equal settings are left out"
    rows = comparison_rows([read_run(run), read_run(other)])
    assert list(rows) == ["exact", "diversity", "other"]
    assert rows["other"][0] is None


def test_runs_of_one_name_are_told_apart(run, make_run):
    other = make_run("elsewhere")
    page = parse(write_comparison([run, other], run / "compare.html"))
    assert str(run) in page.texts
    assert str(other) in page.texts


def test_comparison_of_no_run(run, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_comparison([run, tmp_path], tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0.000"),
        (0.45, "0.450"),
        (-12.3456, "-12.346"),
        (3e-4, "0.0003"),
        (1.5e9, "1.5e+09"),
        (None, "\u2013"),
        (float("nan"), "\u2013"),
    ],
)
def test_number(value, shown):
    assert number(value) == shown


def test_number_with_sign():
    assert number(0.25, sign=True) == "+0.250"
    assert number(-0.25, sign=True) == "-0.250"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (222, "3 min 42 s"), (7260, "2 h 1 min")],
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown
