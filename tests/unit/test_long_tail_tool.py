"""Measurements that tools/measure_long_tail.py passes to the simulation."""

from __future__ import annotations

from types import SimpleNamespace

import measure_long_tail
import numpy as np
import pytest


def test_the_cost_of_a_step_is_the_line_through_its_measurements():
    timer = measure_long_tail.StepTimer(SimpleNamespace(step=lambda: [], get_num_unfinished_requests=lambda: 7))
    assert timer.timed_step() == [] and timer.rows == [7] and timer.seconds[0] >= 0
    timer.rows, timer.seconds = [1, 10, 100], [0.005, 0.014, 0.104]
    cost = timer.cost(64)
    assert (cost.overhead_s, cost.row_s, cost.slots) == (pytest.approx(0.004), pytest.approx(0.001), 64)
    assert cost.step_s(50, cached=0) == pytest.approx(0.054)


def test_lengths_are_those_that_the_run_prescribes_in_its_order():
    drawn = measure_long_tail.RunLengths().draw(np.random.default_rng(0), 5, 3)
    assert drawn.tolist() == [[measure_long_tail.length_of(p, i) for i in range(3)] for p in range(5)]
