"""The list of rewards as it stands in YAML."""

from __future__ import annotations

import pytest

from mmrl.errors import UserError
from rewards.combine import parse_specs

DOTTED = "os.path.join"


def test_defaults():
    (spec,) = parse_specs([{"name": "ocr"}])
    assert (spec.name, spec.label, spec.weight, spec.timeout_s) == ("ocr", "ocr", 1.0, 120.0)
    assert spec.config.model_dump() == {"mode": "soft", "detect": False, "num_threads": 1}


def test_own_keys_and_labels():
    specs = parse_specs(
        [
            {"name": "ocr", "weight": 0.5, "timeout_s": 3},
            {"name": "ocr", "label": "ocr_exact", "mode": "exact", "weight": 0},
        ]
    )
    assert [spec.label for spec in specs] == ["ocr", "ocr_exact"]
    assert [spec.weight for spec in specs] == [0.5, 0.0]
    assert specs[1].config.model_dump()["mode"] == "exact"


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "ocr", "mode": "exact", "weight": -2.0, "label": "x"},
        {"name": "ocr", "tasks": ["signs", "posters"]},
        {"name": "clip_score", "scale": "per100"},
        {"name": "python", "function": DOTTED, "kwargs": {"a": 1}},
        {"name": DOTTED, "kwargs": {"a": 1}},
        {"name": DOTTED},
    ],
)
def test_dump_round_trip(entry):
    specs = parse_specs([entry])
    dumped = specs[0].dump()
    assert entry.items() <= dumped.items()
    assert parse_specs([dumped]) == specs


def test_dotted_name_is_short_for_python():
    short, long = parse_specs(
        [{"name": DOTTED, "label": "a"}, {"name": "python", "function": DOTTED, "label": "b"}]
    )
    assert short.config == long.config
    assert parse_specs([{"name": DOTTED}])[0].label == DOTTED


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name": "ocr"}, "rewards: a list"),
        ("ocr", "rewards: a list"),
        (["ocr"], r"rewards\[0\]: a mapping"),
        ([{"weight": 1}], r"rewards\[0\]\.name: the name of a reward is needed, not None"),
        ([{"name": "ocrr"}], r"rewards\[0\]\.name: unknown .*'ocrr'.*did you mean 'ocr'\?.*python"),
        (
            [{"name": "ocr", "mdoe": "soft"}],
            r"rewards\[0\]\.mdoe: unknown key; did you mean 'mode'\? allowed: .*weight.*detect",
        ),
        ([{"name": "ocr"}, {"name": "ocr", "wieght": 1, "label": "b"}], r"rewards\[1\]\.wieght"),
        (
            [{"name": "ocr"}, {"name": "ocr"}],
            r"rewards\[1\]\.label: 'ocr' is taken by rewards\[0\]",
        ),
        ([{"name": "ocr", "mode": "hard"}], r"rewards\[0\]\.mode: .*'soft' or 'exact' .got 'hard'"),
        ([{"name": "ocr", "num_threads": 0}], r"rewards\[0\]\.num_threads: .*greater.* .got 0"),
        ([{"name": "ocr", "weight": "much"}], r"rewards\[0\]\.weight: .*got 'much'"),
        ([{"name": "ocr", "weight": float("inf")}], r"rewards\[0\]\.weight: .*finite"),
        ([{"name": "ocr", "timeout_s": 0}], r"rewards\[0\]\.timeout_s: .*greater than 0"),
        ([{"name": "ocr", "tasks": []}], r"rewards\[0\]\.tasks: .*at least 1 item"),
        ([{"name": "ocr", "tasks": "signs"}], r"rewards\[0\]\.tasks: .*list .got 'signs'"),
        ([{"name": "python"}], r"rewards\[0\]\.function: required, but missing"),
        ([{"name": DOTTED, "function": "a.b"}], r"rewards\[0\]\.function: unknown key"),
        ([{"name": "ocr", "config": {}}], r"rewards\[0\]\.config: unknown key"),
    ],
)
def test_mistakes(entries, message):
    with pytest.raises(UserError, match=message):
        parse_specs(entries)


def test_build_refuses_what_is_not_there():
    (spec,) = parse_specs([{"name": "os.path.jion"}])
    with pytest.raises(UserError, match="no attribute 'jion'"):
        spec.build()
