"""Where labels beside curves are put."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlora.bench.labels import spread_out


@given(st.lists(st.floats(-5, 5), max_size=8))
def test_labels_are_spread_out_in_order_and_near_their_places(wanted):
    places = spread_out(wanted, 0.5, 10.0)
    stacked = sorted(places)
    assert all(high - low >= 0.5 - 1e-9 for low, high in pairwise(stacked))
    assert all(place <= 10 + 1e-9 for place in places)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert sorted(range(len(wanted)), key=lambda i: places[i]) == order
    if all(abs(a - b) >= 0.5 for i, a in enumerate(wanted) for b in wanted[:i]):
        assert places == pytest.approx(wanted)
