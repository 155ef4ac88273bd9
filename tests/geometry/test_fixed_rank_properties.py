"""What must hold for any point and tangent vector, searched by hypothesis in float64."""

import pytest
import torch
from fixed_rank_cases import TANGENTS, assert_small, dense_point, dense_tangent, size, spread_out
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlora.geometry import (
    Point,
    Tangent,
    inner,
    norm,
    orthogonalize,
    project,
    random_point,
    random_tangent,
    retract,
    transport,
)

# What is well-conditioned is measured at 4e-15 or better. Retraction is worse near a tied r-th singular value, and the
# polar factor has a condition number of up to 1e8 here ("minus X" with s spread out): 1e-10 and 1e-6 leave room for it.
WELL, RETRACTION, POLAR = 1e-13, 1e-10, 1e-6

search = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@st.composite
def points_and_tangents(draw: st.DrawFn) -> tuple[Point, Tangent, torch.Generator]:
    m, n = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    r = draw(st.integers(1, min(m, n)))
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    point = random_point(m, n, r, batch=batch, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        point = spread_out(point, 1e-8)
    make = TANGENTS[draw(st.sampled_from(sorted(TANGENTS)))]
    return point, make(point, generator), generator


def assert_close(got: Tangent, expected: Tangent, allowed: float) -> None:
    gap = norm(Tangent(got.a - expected.a, got.b - expected.b))
    assert_small(gap, allowed * norm(expected))


def assert_orthonormal(basis: torch.Tensor) -> None:
    eye = torch.eye(basis.shape[-1], dtype=basis.dtype)
    assert_small((basis.mT @ basis - eye).abs(), WELL)


@search
@given(points_and_tangents())
def test_retract_returns_a_point(drawn):
    point, tangent, _ = drawn
    moved = retract(point, tangent)
    assert [x.shape for x in moved] == [x.shape for x in point]
    assert_orthonormal(moved.u)
    assert_orthonormal(moved.v)
    assert (moved.s >= 0).all()
    assert (moved.s.diff(dim=-1) <= 0).all()


@search
@given(points_and_tangents())
def test_retracting_nothing_changes_nothing(drawn):
    point, tangent, _ = drawn
    still = dense_point(retract(point, Tangent(0 * tangent.a, 0 * tangent.b)))
    assert_small(size(still - dense_point(point)), WELL * size(dense_point(point)))


@search
@given(points_and_tangents())
def test_every_tangent_keeps_the_gauge(drawn):
    point, tangent, generator = drawn
    m, n = point.u.shape[-2], point.v.shape[-2]
    end = random_point(m, n, point.s.shape[-1], batch=point.s.shape[:-1], generator=generator, dtype=torch.float64)
    for at, xi in ((point, orthogonalize(point, tangent)), (end, transport(point, tangent, end))):
        assert_small(size(at.u.mT @ xi.a), WELL * (norm(tangent) + norm(xi)))


@search
@given(points_and_tangents())
def test_projection_is_idempotent(drawn):
    point, tangent, _ = drawn
    z = dense_tangent(point, tangent)
    assert_close(project(point, z @ point.v, z.mT @ point.u), tangent, WELL)


@search
@given(points_and_tangents())
def test_projection_is_self_adjoint(drawn):
    """<P(Y), Z> = <Y, P(Z)>: with idempotence, what makes a projection orthogonal."""
    point, _, generator = drawn
    shape = (*point.s.shape[:-1], point.u.shape[-2], point.v.shape[-2])
    y, z = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    py, pz = (dense_tangent(point, project(point, w @ point.v, w.mT @ point.u)) for w in (y, z))
    assert_small(((py * z).sum((-2, -1)) - (y * pz).sum((-2, -1))).abs(), WELL * size(y) * size(z))


@search
@given(points_and_tangents())
def test_inner_product_is_symmetric_bilinear_and_definite(drawn):
    point, x, generator = drawn
    y, z = random_tangent(point, generator=generator), random_tangent(point, generator=generator)
    combined = inner(Tangent(2 * x.a + y.a, 2 * x.b + y.b), z)
    scale = (norm(x) + norm(y)) * norm(z)
    assert_small((inner(x, z) - inner(z, x)).abs(), WELL * scale)
    assert_small((combined - 2 * inner(x, z) - inner(y, z)).abs(), WELL * scale)
    assert ((inner(x, x) > 0) == (size(dense_tangent(point, x)) > 0)).all()


@search
@given(points_and_tangents())
def test_transport_to_the_same_point_is_the_identity(drawn):
    point, tangent, _ = drawn
    assert_close(transport(point, tangent, point), tangent, WELL)


@search
@given(points_and_tangents())
def test_transport_never_lengthens(drawn):
    point, tangent, generator = drawn
    end = retract(point, random_tangent(point, generator=generator))
    assert_small(norm(transport(point, tangent, end)), (1 + WELL) * norm(tangent))


@search
@given(points_and_tangents())
def test_orthogonalization_does_not_see_the_scale(drawn):
    """A power of two moves no digits, so it must not move the direction, nor may it underflow."""
    point, tangent, _ = drawn
    expected = orthogonalize(point, tangent)
    for factor in (2.0**-200, 2.0**200):
        scaled = orthogonalize(point, Tangent(factor * tangent.a, factor * tangent.b))
        assert_close(scaled, expected, POLAR)


@search
@given(points_and_tangents())
def test_results_do_not_depend_on_the_signs_of_the_singular_vectors(drawn):
    """X = (u D) diag(s) (v D)^T for any D = diag(+-1); a and b take the signs of v and u."""
    point, tangent, generator = drawn
    signs = 2.0 * torch.randint(2, point.s.shape, generator=generator)[..., None, :] - 1
    flipped = Point(point.u * signs, point.s, point.v * signs)
    same = Tangent(tangent.a * signs, tangent.b * signs)
    scale = size(dense_point(point)) + norm(tangent)
    assert_small(size(dense_point(retract(flipped, same)) - dense_point(retract(point, tangent))), RETRACTION * scale)
    direction = orthogonalize(point, tangent)
    assert_close(orthogonalize(flipped, same), Tangent(direction.a * signs, direction.b * signs), POLAR)


@search
@given(points_and_tangents())
def test_transposing_swaps_the_sides(drawn):
    """retract and orthogonalize commute with X -> X^T, although the gauge treats u and v differently."""
    point, tangent, _ = drawn
    swapped = Point(point.v, point.s, point.u)
    z = dense_tangent(point, tangent).mT
    mirrored = project(swapped, z @ swapped.v, z.mT @ swapped.u)
    scale = size(dense_point(point)) + norm(tangent)
    assert_small(
        size(dense_point(retract(swapped, mirrored)).mT - dense_point(retract(point, tangent))), RETRACTION * scale
    )
    direction = dense_tangent(point, orthogonalize(point, tangent))
    gap = size(dense_tangent(swapped, orthogonalize(swapped, mirrored)).mT - direction)
    assert_small(gap, POLAR * size(direction))


@search
@given(points_and_tangents())
def test_batched_equals_looped(drawn):
    point, tangent, _ = drawn
    flat_point = Point(*(x.reshape(-1, *x.shape[point.s.ndim - 1 :]) for x in point))
    flat_tangent = Tangent(*(x.reshape(-1, *x.shape[-2:]) for x in tangent))
    moved, direction = retract(point, tangent), orthogonalize(point, tangent)
    moved_dense = dense_point(moved).reshape(-1, point.u.shape[-2], point.v.shape[-2])
    for i in range(len(flat_point.s)):
        one, xi = Point(*(x[i] for x in flat_point)), Tangent(*(x[i] for x in flat_tangent))
        scale = size(dense_point(one)) + norm(xi)
        assert_small(size(dense_point(retract(one, xi)) - moved_dense[i]), RETRACTION * scale)
        expected = Tangent(*(x.reshape(-1, *x.shape[-2:])[i] for x in direction))
        assert_close(orthogonalize(one, xi), expected, POLAR)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("factor", [1e-30, 1e-18, 1e18])
def test_extreme_scales_stay_finite(dtype, factor):
    """Gradients of 1e-20 are met in float32, where their squares are zero."""
    generator = torch.Generator().manual_seed(0)
    point = random_point(9, 7, 3, batch=(20,), generator=generator, dtype=dtype)
    tangent = random_tangent(point, generator=generator)
    scaled = Tangent(factor * tangent.a, factor * tangent.b)
    expected, direction = orthogonalize(point, tangent), orthogonalize(point, scaled)
    gap = norm(Tangent(direction.a - expected.a, direction.b - expected.b)) / norm(expected)
    assert_small(gap, {torch.float64: 1e-13, torch.float32: 1e-5}[dtype])  # measured 2e-15 and 6e-7
    assert all(x.isfinite().all() for x in retract(point, scaled))
