"""The cost of losses side by side: the same samples, ratios by hand, and a real measurement."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import update_cost
from benchmarks.objective_zoo import BASE
from mmrl.errors import UserError

SMALL = [
    "training.prompts_per_step=2", "training.group_size=2", "training.micro_batch_size=4",
]  # fmt: skip


def test_ratios_are_those_of_the_same_step():
    lines = update_cost.cost_table({BASE: [1.0, 2.0, 4.0], "mhpo": [1.1, 2.0, 5.0]}).splitlines()
    assert lines[2] == "| grpo | 2.000 | 1.000 | 1.000 | 1.000 |"
    assert lines[3] == "| mhpo | 2.000 | 1.100 | 1.000 | 1.250 |"


def test_from_two_methods_to_the_table(tmp_path):
    words = ["--methods", "mhpo", "--steps", "1", "--out", str(tmp_path), *SMALL]
    assert update_cost.main(words) == 0
    (path,) = tmp_path.glob("*-update-cost-text.json")
    seconds = json.loads(path.read_text())["seconds"]
    assert list(seconds) == [BASE, "mhpo"]
    assert all(len(mine) == 1 and mine[0] > 0 for mine in seconds.values())


def test_other_samples_are_no_comparison(monkeypatch):
    """As they would be if weights moved, or the seed were another."""

    class Drawer:
        def __init__(self, text):
            self.observe, self.text = None, text
            self.scorer = SimpleNamespace(close=lambda: None)

        def step(self):
            group = SimpleNamespace(outputs=[self.text])
            self.observe(SimpleNamespace(groups=[group]), None)

    monkeypatch.setattr(update_cost, "open_trainer", lambda name, options: Drawer(name))
    options = update_cost._parser().parse_args([])
    with pytest.raises(UserError, match="mhpo and grpo drew different samples"):
        update_cost.measure([BASE, "mhpo"], options)


def test_an_unknown_method_is_refused():
    with pytest.raises(UserError, match="unknown 'mhop'; did you mean 'mhpo'"):
        update_cost.main(["--methods", "mhop"])
