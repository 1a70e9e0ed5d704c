"""The kept INT8 measurements are whole, and the default rule is one that they bear out."""

from __future__ import annotations

import json
from pathlib import Path

from reelrt.calibration.layers import Layer, kept_by_default

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def kept(name: str) -> dict:
    found: dict = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_layer_was_measured():
    found = kept("int8-sensitivity")
    assert found["not_measured"] == []
    assert len(found["errors"]) == found["measured"] == found["layers"]
    assert list(found["errors"].values()) == sorted(found["errors"].values(), reverse=True)


def test_the_default_rule_keeps_the_worst_and_halves_the_error():
    found = kept("int8-sensitivity")
    names = list(found["errors"])
    rule = kept_by_default([Layer(name, (name,), "") for name in names], "unet3d")
    assert set(names[:4]) <= set(rule)
    combined = found["combined"]
    assert combined["default rule"]["layers_fp32"] == len(rule)
    assert combined["default rule"]["error"] < 0.5 * combined["all in INT8"]["error"]


def test_a_budget_is_kept():
    combined = kept("int8-sensitivity")["combined"]
    budgets = {float(name.split()[1]): each for name, each in combined.items() if name.startswith("budget")}
    assert len(budgets) == 3
    for budget, each in budgets.items():
        assert each["error"] <= budget


def test_smoothing_was_measured_with_and_without():
    found = kept("int8-smoothing")
    assert len(found["layers"]) == found["products"]
    assert sum(each["used"] for each in found["layers"].values()) == found["used"]
    assert found["together"]["smoothed where it paid alone"] < found["without"]
