"""What a step reports: means, totals and extremes, however they are split."""

from __future__ import annotations

import pytest

from mmrl.metrics import Means
from mmrl.types import Greatest, Least, Total

REPORTS = [
    {"mean": (6.0, 2.0), "least": Least(3), "greatest": Greatest(3), "total": Total(5)},
    {"mean": (1.0, 2.0), "least": Least(1), "greatest": Greatest(9), "total": Total(2)},
    {"mean": (0.0, 0.0), "other": (4.0, 1.0), "nothing": (0.0, 0.0)},
    {"least": Least(2), "greatest": Greatest(4), "total": Total(1)},
]
TOGETHER = {"mean": 1.75, "least": 1.0, "greatest": 9.0, "total": 8.0, "other": 4.0}


@pytest.mark.parametrize("cut", range(5))
def test_any_split_gives_the_same(cut):
    halves = Means(), Means()
    for i, report in enumerate(REPORTS):
        halves[i >= cut].add(report)
    whole = Means()
    for half in halves:
        whole.add(half.metrics)
    assert whole.result() == TOGETHER
    assert all(type(value) is float for value in whole.result().values())


def test_one_name_is_one_kind():
    means = Means()
    means.add({"x": Least(1)})
    with pytest.raises(ValueError, match=r"one metric is 1\.0 and \(1\.0, 2\.0\)"):
        means.add({"x": (1.0, 2.0)})
