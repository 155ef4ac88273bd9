"""Curves over steps: where they reach a goal, and their mean."""

from lightning_rlora.bench.curves import first_reach, interpolate, mean_curve


def test_a_goal_is_reached_between_two_validations():
    curve = [(0, 5.0), (10, 3.0), (20, 2.0), (30, 2.5)]
    assert first_reach(curve, 4.0) == 5
    assert first_reach(curve, 2.25) == 17.5
    assert first_reach(curve, 2.0) == 20
    assert first_reach(curve, 5.0) == 0
    assert first_reach(curve, 1.9) is None
    assert interpolate(curve, 15) == 2.5
    assert interpolate(curve, 30) == 2.5


def test_a_mean_curve_keeps_to_the_common_steps():
    assert mean_curve([[(0, 4.0), (1, 3.0), (2, 1.0)], [(0, 2.0), (2, 2.0)]]) == [(0, 3.0), (2, 1.5)]
    assert mean_curve([]) == []
