"""Triton kernels that factorise many small matrices at once, one an instance, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_LARGEST_ROOT = 32


def warps(wanted: int, most: int) -> int:
    """A number of warps that Triton takes, a power of two, near the one wanted."""
    return 1 << max(1, min(most, wanted)).bit_length() - 1


@triton.jit
def _cholesky(
    matrices, roots, inverses, floors, batch_stride, row_stride, k: tl.constexpr, K: tl.constexpr,
    FLOORED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, K)
    inside = (i < k)[:, None] & (i < k)[None, :]
    diagonal = (i[:, None] == i[None, :]) & inside
    n = tl.load(matrices + item * batch_stride + i[:, None] * row_stride + i[None, :], mask=inside, other=0.0)
    size = tl.sum(tl.where(diagonal, n, 0.0), 1)
    if FLOORED:
        floor = tl.load(floors + item)
        scale = tl.full((K,), 1.0, tl.float64)
    else:
        floor = 0.0
        scale = tl.where(i < k, 1 / tl.sqrt(size), 1.0)
        n = n * scale[:, None] * scale[None, :]
    ahead = i < k
    lower = tl.zeros((K, K), tl.float64)
    inverse = tl.where(diagonal, 1.0, 0.0).to(tl.float64)  # of lower, by the same row operations
    for step in range(k):
        if FLOORED:
            # the largest that is left: with the columns in their own order, ill-conditioned ones could come first
            j = tl.argmax(tl.where(ahead, size, -1.0), 0)
        else:
            j = step
        column = tl.sum(tl.where(i[None, :] == j, n, 0.0), 1)
        pivot = tl.sum(tl.where(i == j, column, 0.0), 0)
        kept = pivot > floor
        reciprocal = tl.where(kept, 1 / tl.sqrt(tl.where(kept, pivot, 1.0)), 0.0)
        column = tl.where(ahead, column * reciprocal, 0.0)
        ahead = ahead & (i != j)
        n -= column[:, None] * column[None, :]
        size -= column * column
        lower = tl.where(i[None, :] == j, column[:, None], lower)
        row = tl.sum(tl.where(i[:, None] == j, inverse, 0.0), 0) * reciprocal
        below = tl.where(ahead, column, 0.0)
        inverse = tl.where(i[:, None] == j, row[None, :], inverse - below[:, None] * row[None, :])
    # N = L L^T: the root is L^T, with the scaling undone, and its inverse L^-T
    out = item * k * k + i[:, None] * k + i[None, :]
    tl.store(roots + out, tl.trans(lower) / scale[None, :], mask=inside)
    tl.store(inverses + out, tl.trans(inverse) * scale[:, None], mask=inside)


def cholesky(n: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Upper R with R^T R = N and R^-1, float64 (L, k, k), of positive definite N; or of semidefinite N with a floor.

    With `floor` (L,), columns are taken by the size of what is outside those taken before, so R is a triangle with its
    columns permuted. One whose part has a squared norm of at most the floor counts as a combination of the others: its
    row of R and its column of the inverse T are zero, and T^T N T = 1 on the rest. Without, N is scaled to a unit
    diagonal first.
    """
    k = n.shape[-1]
    if k > _LARGEST_ROOT:
        return _cholesky_in_blocks(n, floor)
    roots, inverses = (torch.empty_like(n, memory_format=torch.contiguous_format) for _ in range(2))
    _cholesky[(len(n),)](
        n, roots, inverses, n if floor is None else floor, n.stride(0), n.stride(1),
        k=k, K=triton.next_power_of_2(k), FLOORED=floor is not None, num_warps=warps(k * k // 512, 8),
    )  # fmt: skip
    return roots, inverses


def _cholesky_in_blocks(n: Tensor, floor: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same in halves: registers hold only a small matrix well, and products are quick."""
    h = n.shape[-1] // 2
    first, first_inverse = cholesky(n[:, :h, :h], floor)
    beside = first_inverse.mT @ n[:, :h, h:]
    last, last_inverse = cholesky(torch.baddbmm(n[:, h:, h:], beside.mT, beside, alpha=-1), floor)
    root, inverse = n.new_zeros(2, *n.shape).unbind()
    root[:, :h, :h], root[:, :h, h:], root[:, h:, h:] = first, beside, last
    inverse[:, :h, :h], inverse[:, h:, h:] = first_inverse, last_inverse
    inverse[:, :h, h:] = -(first_inverse @ beside) @ last_inverse
    return root, inverse


@triton.jit
def _rotate(p, q, live, worst):
    """Rotations that make each row of p orthogonal to its row of q; the two change places."""
    a = tl.sum(p * p, 1)
    b = tl.sum(q * q, 1)
    g = tl.sum(p * q, 1)
    live = live & (g != 0)
    cosine = tl.abs(g) / tl.sqrt(tl.where(live, a * b, 1.0))
    worst = tl.maximum(worst, tl.where(live, cosine, 0.0).to(tl.float32))
    # the angle need not be exact, only the rotation orthogonal
    zeta = ((b - a) / tl.where(live, 2 * g, 1.0)).to(tl.float32)
    tangent = tl.where(zeta >= 0, 1.0, -1.0) / (tl.abs(zeta) + tl.sqrt(1 + zeta * zeta))
    tangent = tl.where(live, tangent, 0.0)
    square = 1 + tangent.to(p.dtype) * tangent.to(p.dtype)
    c = tl.rsqrt(1 + tangent * tangent).to(p.dtype)
    c = c * (1.5 - 0.5 * square * c * c)
    c = c * (1.5 - 0.5 * square * c * c)
    s = c * tangent.to(p.dtype)
    return s[:, None] * p + c[:, None] * q, c[:, None] * p - s[:, None] * q, worst


@triton.jit
def _jacobi(
    columns, n: tl.constexpr, height: tl.constexpr, HALF: tl.constexpr, HEIGHT: tl.constexpr, TOLERANCE: tl.constexpr,
    SWEEPS: tl.constexpr,
):  # fmt: skip
    """One-sided Jacobi, a matrix an instance, its columns in registers: pairs of neighbours, then of the others.

    Convergence is quadratic: a sweep that met cosines of at most TOLERANCE leaves about their squares, but for columns
    of nearly equal singular values, whose cosines stay below it.
    """
    i = tl.arange(0, HALF)
    row = tl.arange(0, HEIGHT)
    even = i < n // 2
    odd = i < n // 2 - 1
    inside = even[:, None] & (row < height)[None, :]
    pointers = columns + tl.program_id(0).to(tl.int64) * n * height + 2 * i[:, None] * height + row[None, :]
    p = tl.load(pointers, mask=inside, other=0.0)
    q = tl.load(pointers + height, mask=inside, other=0.0)
    after = tl.minimum(i + 1, HALF - 1)[:, None] + tl.zeros((HALF, HEIGHT), tl.int32)
    before = tl.maximum(i - 1, 0)[:, None] + tl.zeros((HALF, HEIGHT), tl.int32)
    cosine = 1.0
    sweep = 0
    while (cosine > TOLERANCE) & (sweep < SWEEPS):
        worst = tl.zeros((HALF,), tl.float32)
        for _ in range(n // 2):
            # columns wander by one place a round, so that all pairs meet once in a sweep
            p_new, q_new, worst = _rotate(p, q, even, worst)
            p = tl.where(even[:, None], p_new, p)
            q = tl.where(even[:, None], q_new, q)
            neighbour = tl.gather(p, after, 0)
            q_new, neighbour_new, worst = _rotate(q, neighbour, odd, worst)
            q = tl.where(odd[:, None], q_new, q)
            neighbour = tl.where(odd[:, None], neighbour_new, neighbour)
            p = tl.where((i == 0)[:, None], p, tl.gather(neighbour, before, 0))
        cosine = tl.max(worst, 0)
        sweep += 1
    tl.store(pointers, p, mask=inside)
    tl.store(pointers + height, q, mask=inside)


def orthogonal_columns(matrices: Tensor, cosine: float = 1e-7) -> Tensor:
    """K W (L, p, n) with orthogonal columns for some orthogonal W, of matrices K (L, p, n), float32 or float64.

    The columns are the left singular vectors times the singular values, in no order.

    Args:
        matrices: K, at most 128 x 128.
        cosine: Done after a sweep that met no larger one; see `_jacobi` for what is left then.
    """
    batch, p, n = matrices.shape
    columns = nn.functional.pad(matrices.mT, (0, 0, 0, n % 2)).clone(memory_format=torch.contiguous_format)
    even = columns.shape[1]
    _jacobi[(batch,)](
        columns, n=even, height=p, HALF=triton.next_power_of_2(even // 2), HEIGHT=triton.next_power_of_2(p),
        TOLERANCE=cosine, SWEEPS=20, num_warps=warps(even * p * columns.element_size() // 8192, 16),
    )  # fmt: skip
    turned = columns.mT
    if even > n:  # the column of zeros that made their number even may be anywhere
        kept = turned.norm(dim=1, keepdim=True).topk(n, dim=2).indices
        turned = turned.gather(2, kept.expand(-1, p, -1))
    return turned
