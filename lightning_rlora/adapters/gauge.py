"""The balanced gauge: LoRA factors as points of the fixed-rank manifold.

With PEFT's scaling c, a point X = U diag(s) V^T is stored as B = U sqrt(s / c), A = sqrt(s / c) V^T, so that c B A = X.
The two factors then have equal column norms, and autograd's factor gradients are the products that a projection needs:
grad_B = c G A^T and grad_A = c B^T G for a loss gradient G with respect to X.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

from lightning_rlora.adapters.pairs import LoraPair, matrix
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import Point
from lightning_rlora.geometry.gram import gram
from lightning_rlora.geometry.stacks import stacked_by_shape

START = 1e-6
"""Singular values of the point that replaces a zero product: small enough to leave the function unchanged to rounding,
large enough for the factors, of size sqrt(START / c), to be exact to three digits in float16."""


def read_point(b: Tensor, a: Tensor, scaling: float) -> Point:
    """The point c B A of any two factors, (..., m, r) and (..., r, n), by two QRs and one r x r SVD in float64.

    U and V are orthonormal also where the product is rank deficient; its missing singular values are then zero.
    """
    qb, rb = torch.linalg.qr(b.double())
    qa, ra = torch.linalg.qr(a.double().mT)
    u, s, vt = torch.linalg.svd(scaling * rb @ ra.mT)
    return Point(qb @ u, s, qa @ vt.mT)


def balanced_factors(point: Point, scaling: float) -> tuple[Tensor, Tensor]:
    """B (..., m, r) and A (..., r, n) of a point in the balanced gauge."""
    root = (point.s / abs(scaling)).sqrt().unsqueeze(-2)
    return point.u * root, (point.v * root).mT if scaling > 0 else -(point.v * root).mT


@torch.no_grad()
def write_point(pair: LoraPair, point: Point) -> None:
    """Set a pair's factors to a point (m, r), (r,), (n, r), in the balanced gauge."""
    b, a = balanced_factors(point, pair.scaling)
    pair.b.copy_(b.reshape(pair.b.shape))
    pair.a.copy_(a.reshape(pair.a.shape))


def group_by_shape(pairs: Iterable[LoraPair]) -> list[list[LoraPair]]:
    """Pairs that can be stacked into one batch: equal (m, n, r), scaling, dtype and device."""
    groups: dict[Hashable, list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        groups[(pair.shape, pair.scaling, pair.a.dtype, pair.a.device)].append(pair)
    return list(groups.values())


@torch.no_grad()
def read_points(pairs: list[LoraPair]) -> Point:
    """A batch of points, (L, m, r), (L, r), (L, n, r) in float64, of L pairs of one shape (see `group_by_shape`)."""
    b = torch.stack([matrix(pair.b) for pair in pairs])
    a = torch.stack([matrix(pair.a) for pair in pairs])
    return read_point(b, a, pairs[0].scaling)


@torch.no_grad()
def start_factors(b: Tensor, a: Tensor, scaling: float, generator: torch.Generator) -> bool:
    """Give a product that is not of full rank a tiny full-rank start, in place; say whether it was needed.

    A factor of zeros (PEFT's default B) is replaced by a random orthonormal one, which keeps the row or column space of
    the other; singular values under `START` are raised to it.

    Args:
        b: Factor B (m, r) or a convolution's, changed in place.
        a: Factor A (r, n) or a convolution's, changed in place.
        scaling: PEFT's c.
        generator: Source of the random factor, on the CPU.
    """
    matrices = []
    for factor in (matrix(b), matrix(a).mT):
        random = torch.randn(factor.shape, generator=generator, dtype=torch.float64).to(factor.device)
        matrices.append(torch.where((factor == 0).all(), random, factor.double()))
    left, right = matrices
    if bool(b.any()) and bool(a.any()) and _has_full_rank(left, b.dtype) and _has_full_rank(right, a.dtype):
        return False
    point = read_point(left, right.mT, scaling)
    if not (bool(b.any()) and bool(a.any())):
        point = point._replace(s=torch.zeros_like(point.s))
    new_b, new_a = balanced_factors(point._replace(s=point.s.clamp_min(START)), scaling)
    b.copy_(new_b.reshape(b.shape))
    a.copy_(new_a.reshape(a.shape))
    return True


def _has_full_rank(tall: Tensor, dtype: torch.dtype) -> bool:
    """Whether the columns of a factor are independent beyond the rounding of the dtype it is stored in.

    Columns are scaled to unit norm first: those of a balanced factor may be of very different sizes.
    """
    sizes = tall.norm(dim=0)
    if not bool((sizes > 0).all()):
        return False
    return int(torch.linalg.matrix_rank(tall / sizes, rtol=10 * torch.finfo(dtype).eps)) == tall.shape[1]


def refuse_trained(pairs: list[LoraPair], start: str) -> None:
    """Refuse pairs that hold an update already, beyond the tiny start that optimizers on the manifold give.

    Raises:
        UserError: If a product is not near zero.
    """
    for pair, size in zip(pairs, _sizes(pairs), strict=True):
        if size > 10 * START:
            raise UserError(
                f"the adapter of layer {pair.name} holds an update already (trained before, or by its "
                f"init_lora_weights), which {start} would throw away: start a new one, or leave the callback out"
            )


@torch.no_grad()
def _sizes(pairs: list[LoraPair]) -> list[float]:
    """The root mean square of each product's r singular values, by |B A|^2 = tr(B^T B A A^T)."""

    def squares(b: Tensor, a: Tensor) -> tuple[Tensor]:
        return ((gram(b) * gram(a.mT)).sum((-2, -1)),)

    found = stacked_by_shape(squares, [matrix(pair.b) for pair in pairs], [matrix(pair.a) for pair in pairs])
    totals = torch.stack([square.to(found[0][0].device) for (square,) in found]).tolist()
    return [pair.scaling * (max(x, 0.0) / pair.shape[2]) ** 0.5 for pair, x in zip(pairs, totals, strict=True)]
