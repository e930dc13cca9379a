"""Measurements that tools/measure_long_tail.py passes to the simulation."""

from __future__ import annotations

from types import SimpleNamespace

import measure_long_tail
import numpy as np
import pytest


def test_the_cost_of_a_step_is_fitted_to_its_measurements():
    growing = [7]
    engine = SimpleNamespace(step=lambda: [], get_num_unfinished_requests=lambda: growing[0])
    timer = measure_long_tail.StepTimer(engine)
    assert timer.timed_step() == [] and timer.seconds[0] >= 0
    growing[0] = 9
    timer.timed_step()
    assert timer.rows == [(1, 7, 7), (1, 9, 2)]
    timer.rows = [(1, 1, 1), (1, 10, 0), (1, 100, 0), (1, 20, 10)]
    timer.seconds = [0.004 + 0.001 * growing + 0.002 * started for _, growing, started in timer.rows]
    cost = timer.cost(64)
    assert (cost.overhead_s, cost.row_s, cost.start_s, cost.slots) == (
        *map(pytest.approx, (0.004, 0.001, 0.002)),
        64,
    )
    assert cost.step_s(50, cached=0) == pytest.approx(0.054)


def test_no_cost_is_below_zero_and_the_others_fit_without_it():
    timer = measure_long_tail.StepTimer(SimpleNamespace(step=lambda: [], get_num_unfinished_requests=lambda: 7))
    timer.rows, timer.seconds = [(1, 1, 1), (1, 2, 0), (1, 3, 0)], [0.0, 0.2, 0.3]  # free starts would cost -0.1
    cost = timer.cost(64)
    assert cost.start_s == 0 and cost.overhead_s == 0 and cost.row_s == pytest.approx(1.3 / 14)


def test_lengths_are_those_that_the_run_prescribes_in_its_order():
    drawn = measure_long_tail.RunLengths().draw(np.random.default_rng(0), 5, 3)
    assert drawn.tolist() == [[measure_long_tail.length_of(p, i) for i in range(3)] for p in range(5)]
