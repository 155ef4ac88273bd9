"""Generated points and tangent vectors for the geometry tests, and their oracles: dense float64 matrices."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry import Point, Tangent, project, random_point, random_tangent

BATCH = 20

SHAPES = [  # (m, n, r)
    (40, 24, 8),
    (12, 9, 3),
    (9, 12, 4),
    (8, 8, 4),  # 2r = m = n
    (9, 7, 5),  # 2r > m, n
    (6, 30, 5),  # 2r > m only
    (30, 6, 4),  # 2r > n only
    (6, 6, 6),  # r = m = n
    (8, 5, 5),  # r = n
    (5, 8, 5),  # r = m
    (7, 10, 1),
    (1, 6, 1),
    (1, 1, 1),
]


def _generic(point: Point, generator: torch.Generator) -> Tangent:
    return random_tangent(point, generator=generator)


def _tiny(point: Point, generator: torch.Generator) -> Tangent:
    a, b = random_tangent(point, generator=generator)
    return Tangent(1e-12 * a, 1e-12 * b)


def _rank_one_parts(point: Point, generator: torch.Generator) -> Tangent:
    a, b = random_tangent(point, generator=generator)
    mix = torch.randn(a.shape[-1], generator=generator, dtype=a.dtype)
    return project(point, a[..., :1] * mix, b[..., :1] * mix)


def _zero_columns(point: Point, generator: torch.Generator) -> Tangent:
    """The first columns are zero: a QR of `a` alone would begin with unit vectors that are not orthogonal to u."""
    keep = torch.arange(point.s.shape[-1]) > 0
    a, b = random_tangent(point, generator=generator)
    return Tangent(a * keep, b * keep)


def _only_a(point: Point, generator: torch.Generator) -> Tangent:
    a, b = random_tangent(point, generator=generator)
    if a.shape[-2] == a.shape[-1]:  # u spans everything: `a` holds rounding errors, which alone are no tangent vector
        a = torch.zeros_like(a)
    return Tangent(a, torch.zeros_like(b))


def _only_b(point: Point, generator: torch.Generator) -> Tangent:
    a, b = random_tangent(point, generator=generator)
    return Tangent(torch.zeros_like(a), b)


def _inside_column_space(point: Point, generator: torch.Generator) -> Tangent:
    """`a` is nothing but the rounding error of the projection, and not orthogonal to u at its own scale."""
    mix = torch.randn(*point.u.shape[:-2], point.s.shape[-1], point.s.shape[-1], generator=generator).to(point.u)
    return project(point, point.u @ mix, random_tangent(point, generator=generator).b)


def _minus_x(point: Point, generator: torch.Generator) -> Tangent:
    """X + xi = 0: the best approximation has left the manifold."""
    return Tangent(torch.zeros_like(point.u), -point.v * point.s[..., None, :])


def _zero(point: Point, generator: torch.Generator) -> Tangent:
    return Tangent(torch.zeros_like(point.u), torch.zeros_like(point.v))


TANGENTS: dict[str, Callable[[Point, torch.Generator], Tangent]] = {
    "generic": _generic,
    "tiny": _tiny,
    "rank-one parts": _rank_one_parts,
    "zero columns": _zero_columns,
    "only a": _only_a,
    "only b": _only_b,
    "inside the column space": _inside_column_space,
    "minus X": _minus_x,
    "zero": _zero,
}


class Case(NamedTuple):
    """A batch of points, each with a tangent vector, and a label for messages."""

    label: str
    point: Point
    tangent: Tangent


def spread_out(point: Point, spread: float) -> Point:
    """Replace the singular values by a geometric sequence from 1 to `spread`."""
    r = point.s.shape[-1]
    s = spread ** (torch.arange(r, dtype=point.s.dtype) / max(r - 1, 1))
    return point._replace(s=s.expand_as(point.s).contiguous())


def cases(shape: tuple[int, int, int], dtype: torch.dtype) -> Iterator[Case]:
    """Every kind of tangent vector at points with near and far singular values, BATCH of each."""
    generator = torch.Generator().manual_seed(100 * shape[0] + 10 * shape[1] + shape[2])
    for spread in (None, 1e-8):
        for kind, make in TANGENTS.items():
            point = random_point(*shape, batch=(BATCH,), generator=generator, dtype=dtype)
            if spread is not None:
                point = spread_out(point, spread)
            yield Case(f"{shape}, {kind}, spread {spread}", point, make(point, generator))


def dense_point(point: Point) -> Tensor:
    u, s, v = (x.double() for x in point)
    return torch.einsum("...ik,...k,...jk->...ij", u, s, v)


def dense_tangent(point: Point, tangent: Tangent) -> Tensor:
    u, _, v = (x.double() for x in point)
    a, b = (x.double() for x in tangent)
    return torch.einsum("...ik,...jk->...ij", a, v) + torch.einsum("...ik,...jk->...ij", u, b)


def dense_projection(point: Point, z: Tensor) -> Tensor:
    """Z minus what lies outside both the column and the row space of X."""
    u, v = point.u.double(), point.v.double()
    outside_u = torch.eye(u.shape[-2], dtype=torch.float64) - u @ u.mT
    outside_v = torch.eye(v.shape[-2], dtype=torch.float64) - v @ v.mT
    return z - outside_u @ z @ outside_v


def size(z: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(z)


def relative_error(got: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Frobenius error over a scale; where the scale is zero the error must be zero, too, or the result is infinite."""
    error = size(got - expected)
    return torch.where(error == 0, 0, error / scale)


def assert_small(error: Tensor, allowed: Tensor | float, label: str = "") -> None:
    """Every entry of `error` must be at most `allowed`; NaN is not."""
    assert (error <= allowed).all(), f"{label} error {error.max():.1e}, allowed {torch.as_tensor(allowed).min():.1e}"
