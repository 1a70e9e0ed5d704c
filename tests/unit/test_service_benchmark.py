"""The arithmetic of the service's load test, and what it calls a goal reached."""

from __future__ import annotations

import math

import pytest

from benchmarks.verdicts import Costs, Goal, growth, per_minute, percentiles, ratio


def test_percentiles_are_values_that_were_measured() -> None:
    seconds = [number / 1000 for number in range(1, 101)]
    assert percentiles(seconds) == {"count": 100, "p50_ms": 50, "p95_ms": 95, "p99_ms": 99, "max_ms": 100}
    assert percentiles([0.004, 0.001, 0.002])["p99_ms"] == 4
    assert percentiles([0.5])["p50_ms"] == 500
    with pytest.raises(ValueError, match="nothing was measured"):
        percentiles([])


def test_ratios_are_of_medians_and_throughput_is_per_minute() -> None:
    assert ratio([1.03, 1.03, 50.0], [1.0, 0.9, 1.0]) == 1.03
    assert per_minute(4, 8.0) == 30


@pytest.mark.parametrize(
    ("goal", "reached"),
    [
        (Goal("overhead", 1.03, 1.03), True),
        (Goal("overhead", 1.0301, 1.03), False),
        (Goal("stall", 49.9, 50, "ms", strict=True), True),
        (Goal("stall", 50.0, 50, "ms", strict=True), False),
        (Goal("overhead", math.nan, 1.03), False),
        (Goal("lost", 0, 0), True),
        (Goal("lost", 1, 0), False),
    ],
)
def test_a_goal_is_reached_or_not(goal: Goal, reached: bool) -> None:
    assert goal.reached is reached


def test_a_leak_is_seen_and_what_is_filled_once_is_none() -> None:
    jobs = list(range(0, 500, 10))
    leak = growth(jobs, [100e6 + 4096 * done for done in jobs])
    assert leak.per_job == pytest.approx(4096)
    assert leak.last - leak.first == pytest.approx(4096 * 450, rel=0.01)
    filled = growth(jobs, [100e6 + min(4096 * done, 400_000) for done in jobs])
    assert filled.per_job == pytest.approx(0, abs=1e-6)
    assert growth([0, 1, 2, 3], [5.0, 5.0, 5.0, 5.0]).last == 5
    with pytest.raises(ValueError, match="too few"):
        growth([0, 1, 2], [1.0, 1.0, 1.0])


def test_the_bound_is_all_cores_busy() -> None:
    # 50 launches of 30 ms, and 0.5 s of one core for all the rest.
    costs = Costs(2, 50, (2.0, 3.5), (0.03, 0.06), (0.12, 0.24), 4)
    assert costs.busy == pytest.approx(0.875)
    assert costs.launch_gain == pytest.approx(1)
    assert costs.bound == pytest.approx(4 / 3.5)
    # A launch of four that takes the processors half as long per video leaves 50 * 0.03 s less to do.
    cheaper = Costs(2, 50, (2.0, 3.5), (0.03, 0.06), (0.06, 0.12), 4)
    assert cheaper.launch_gain == pytest.approx(2)
    assert cheaper.bound == pytest.approx(4 / 2)
