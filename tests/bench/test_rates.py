"""Windows of learning rates against windows found by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlora.bench.rates import best_rate, rate_window

INF = math.inf


def test_a_window_ends_where_the_line_between_two_rates_crosses_the_limit():
    window = rate_window({0.01: 1.04, 0.1: 1.0, 1.0: 1.02})
    # the limit is 1.01: a quarter of the way from 0.1 to 0.01 in log rate, half of the way from 0.1 to 1
    assert window.low == pytest.approx(10**-1.25)
    assert window.high == pytest.approx(10**-0.5)
    assert window.ratio == pytest.approx(10**0.75)
    assert not window.open_low and not window.open_high


def test_a_window_that_meets_no_limit_is_open_and_one_that_meets_divergence_is_not():
    window = rate_window({0.1: 1.005, 0.2: 1.0, 0.4: INF, 0.8: 1.0})
    assert (window.low, window.open_low) == (0.1, True)
    assert (window.high, window.open_high) == (0.2, False)


def test_a_window_does_not_jump_over_a_bad_rate():
    window = rate_window({0.1: 1.0, 0.2: 2.0, 0.4: 1.0})
    assert window.high < 0.2


def test_nothing_is_known_where_everything_diverged():
    assert rate_window({0.1: INF, 0.2: INF}).ratio == 1


@given(st.dictionaries(st.floats(1e-6, 1e3), st.floats(0.1, 10), min_size=1, max_size=6), st.floats(0, 0.5))
def test_a_window_holds_the_best_rate_and_lies_within_the_rates(by_rate, share):
    window = rate_window(by_rate, share)
    slack = 1 + 1e-12  # exp(log(rate)) is the rate to rounding
    assert min(by_rate) <= window.low * slack and window.high <= max(by_rate) * slack
    assert window.low <= best_rate(by_rate) * slack and best_rate(by_rate) <= window.high * slack
