"""`bench host --tiny`: the conditions are what they say, and the twins are compared as they should be."""

from __future__ import annotations

import json
from statistics import median

import numpy as np
import pytest

from mlx_flash.bench import host_share
from mlx_flash.bench.__main__ import make_parser
from mlx_flash.errors import UsageError


def test_the_conditions_hold(capsys: pytest.CaptureFixture[str]) -> None:
    result = host_share.measure(pairs=4, layers=2)
    host_share.show(result)
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {(row["model"], row["condition"]): row for row in printed["rows"]}
    assert len(rows) == len(result["rows"]) == 7
    for (model, condition), row in rows.items():
        missing = "misses" in condition
        assert row["hits"] == 1 if not missing else 0.6 < row["hits"] < 1
        assert (row["c_calls_per_layer"] > 0) == missing
        assert row["waits_per_layer"] == (0 if (model, condition) == ("mixture", "all resident") else 1)
        assert (row["begun_per_layer"] > 0) == ("overlapped" in condition)
        assert row["interval"][0] <= row["ratio"] <= row["interval"][1]
        steps = row["us_per_layer"]
        assert (steps[host_share.READ_BACK] > 0) == (row["waits_per_layer"] > 0)
        assert (steps[host_share.WAIT] > 0) == (steps[host_share.SUBMIT] > 0) == missing


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        values = rng.exponential(size=41).tolist()
        low, high = host_share.median_interval(values)
        assert low <= median(values) <= high
        held += low <= np.log(2) <= high
    assert held >= 0.93 * 400


def test_tiny_models_are_made_not_given() -> None:
    arguments = make_parser().parse_args(["host", "--tiny", "--memory", "4GB"])
    with pytest.raises(UsageError, match="makes its own models"):
        arguments.run(arguments)
