"""Triton kernels for the matrices that products cannot do: one-sided Jacobi in global memory, exact and slow.

Instances whose matrix does not need it return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_rlora.optim.cuda.product_kernels import _entries, _product
from lightning_rlora.optim.cuda.small_kernels import _rotate

_DEPTH = 16
_PAIRS = 8
_SWEEPS = 30
_COSINE = 1e-10


@triton.jit
def _orthogonalise(
    matrices, columns, n: tl.constexpr, TILE: tl.constexpr, HEIGHT: tl.constexpr, PAIRS: tl.constexpr,
    SWEEPS: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """One-sided Jacobi on the columns, stored as rows: in round t of a tournament column t + i meets column t - i."""
    for x in range(n // TILE):
        for y in range(n // TILE):
            tl.store(columns + _entries(y, x, n, TILE), tl.trans(tl.load(matrices + _entries(x, y, n, TILE))))
    tl.debug_barrier()
    row = tl.arange(0, HEIGHT)
    cosine = 1.0
    sweep = 0
    while (cosine > COSINE) & (sweep < SWEEPS):
        worst = tl.zeros((PAIRS,), tl.float32)
        for t in range(n - 1):
            for start in range(0, n // 2, PAIRS):
                i = start + tl.arange(0, PAIRS)
                real = i < n // 2
                first = (t + i) % (n - 1)
                second = tl.where(i == 0, n - 1, (t - i + n - 1) % (n - 1))
                inside = real[:, None] & (row < n)[None, :]
                at_first = columns + first[:, None] * n + row[None, :]
                at_second = columns + second[:, None] * n + row[None, :]
                p = tl.load(at_first, mask=inside, other=0.0)
                q = tl.load(at_second, mask=inside, other=0.0)
                q, p, worst = _rotate(p, q, real, worst)
                tl.store(at_first, p, mask=inside)
                tl.store(at_second, q, mask=inside)
            tl.debug_barrier()
        cosine = tl.max(worst, 0)
        sweep += 1


@triton.jit
def _exact_polar(
    matrices, scratch, out, needed, tolerance, n: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    HEIGHT: tl.constexpr, PAIRS: tl.constexpr, SWEEPS: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    if tl.load(needed + item) == 0:
        return
    matrices += item * n * n
    columns = scratch + item * 2 * n * n
    turned = columns + n * n
    out += item * n * n
    _orthogonalise(matrices, columns, n, TILE, HEIGHT, PAIRS, SWEEPS, COSINE)
    row = tl.arange(0, HEIGHT)
    largest = tl.zeros((PAIRS,), tl.float64)
    for start in range(0, n, PAIRS):
        x = tl.load(columns + (start + tl.arange(0, PAIRS))[:, None] * n + row[None, :], mask=(row < n)[None, :])
        x = tl.where((row < n)[None, :], x, 0.0)
        largest = tl.maximum(largest, tl.sum(x * x, 1))
    floor = tolerance * tolerance * tl.max(largest, 0)
    tl.debug_barrier()
    for start in range(0, n, PAIRS):  # u instead of u s, or zeros
        pointers = columns + (start + tl.arange(0, PAIRS))[:, None] * n + row[None, :]
        x = tl.load(pointers, mask=(row < n)[None, :], other=0.0)
        square = tl.sum(x * x, 1)
        kept = square > floor
        size = tl.where(kept, 1 / tl.sqrt(tl.where(kept, square, 1.0)), 0.0)
        tl.store(pointers, x * size[:, None], mask=(row < n)[None, :])
        tl.store(turned + start + tl.arange(0, PAIRS), size)  # the first row, for a moment
    tl.debug_barrier()
    sizes = tl.load(turned + row, mask=row < n, other=0.0)
    tl.debug_barrier()
    for i in range(n // TILE):
        place = i * TILE + tl.arange(0, TILE)
        size = tl.sum(tl.where(place[:, None] == row[None, :], sizes[None, :], 0.0), 1)
        for j in range(n // TILE):
            product = _product(columns, matrices, i, j, n, TILE, DEPTH, False)
            tl.store(turned + _entries(i, j, n, TILE), product * size[:, None])
    tl.debug_barrier()
    for i in range(n // TILE):
        for j in range(n // TILE):
            tl.store(out + _entries(i, j, n, TILE), _product(columns, turned, i, j, n, TILE, DEPTH, True))


def exact_polar(matrices: Tensor, scratch: Tensor, out: Tensor, needed: Tensor, tolerance: float) -> None:
    """The polar factors of those matrices (L, n, n) that need it, by one-sided Jacobi; the others stay in `out`.

    Args:
        matrices: float64, contiguous.
        scratch: float64 (L, 2, n, n).
        out: float64 (L, n, n).
        needed: int32 (L,).
        tolerance: As of `lightning_rlora.geometry.gram.polar_factor`.
    """
    n = matrices.shape[-1]
    _exact_polar[(len(matrices),)](
        matrices, scratch, out, needed, tolerance, n=n, TILE=min(32, n), DEPTH=_DEPTH,
        HEIGHT=triton.next_power_of_2(n), PAIRS=_PAIRS, SWEEPS=_SWEEPS, COSINE=_COSINE, num_warps=8, num_stages=1,
    )  # fmt: skip


@triton.jit
def _exact_triplets(
    matrices, scratch, p, sigma, q, needed, n: tl.constexpr, SIZE: tl.constexpr, r: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr, HEIGHT: tl.constexpr, PAIRS: tl.constexpr, SWEEPS: tl.constexpr,
    COSINE: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    if tl.load(needed + item) == 0:
        return
    matrices += item * n * n
    columns = scratch + item * 2 * n * n
    turned = columns + n * n
    p += item * SIZE * r
    q += item * SIZE * r
    sigma += item * r
    _orthogonalise(matrices, columns, n, TILE, HEIGHT, PAIRS, SWEEPS, COSINE)
    row = tl.arange(0, HEIGHT)
    inside = (row < n)[None, :]
    for start in range(0, n, PAIRS):
        c = start + tl.arange(0, PAIRS)
        x = tl.load(columns + c[:, None] * n + row[None, :], mask=inside, other=0.0)
        tl.store(turned + c, tl.sum(x * x, 1))  # the first row, for a moment
    tl.debug_barrier()
    squares = tl.load(turned + row, mask=row < n, other=-1.0)
    tl.debug_barrier()
    for start in range(0, n, PAIRS):
        c = start + tl.arange(0, PAIRS)
        x = tl.load(columns + c[:, None] * n + row[None, :], mask=inside, other=0.0)
        square = tl.sum(tl.where(c[:, None] == row[None, :], squares[None, :], 0.0), 1)
        larger = (squares[None, :] > square[:, None]) | (
            (squares[None, :] == square[:, None]) & (row[None, :] < c[:, None])
        )
        place = tl.sum(larger.to(tl.int32), 1)
        kept = place < r
        size = tl.sqrt(square)
        x = x / tl.where(size > 0, size, 1.0)[:, None]
        tl.store(p + row[None, :] * r + place[:, None], x, mask=kept[:, None] & (row < SIZE)[None, :])
        tl.store(sigma + place, size, mask=kept)
        tl.store(turned + place[:, None] * n + row[None, :], x, mask=inside)  # sorted
    tl.debug_barrier()
    for i in range(n // TILE):
        for j in range(n // TILE):
            tl.store(columns + _entries(i, j, n, TILE), _product(turned, matrices, i, j, n, TILE, DEPTH, False))
    tl.debug_barrier()
    for start in range(0, r, PAIRS):
        c = start + tl.arange(0, PAIRS)
        x = tl.load(columns + c[:, None] * n + row[None, :], mask=(c < r)[:, None] & inside, other=0.0)
        size = tl.sqrt(tl.sum(x * x, 1))
        x = x / tl.where(size > 0, size, 1.0)[:, None]
        tl.store(q + row[None, :] * r + c[:, None], x, mask=(c < r)[:, None] & (row < SIZE)[None, :])


def exact_triplets(matrices: Tensor, scratch: Tensor, p: Tensor, sigma: Tensor, q: Tensor, needed: Tensor) -> None:
    """The leading triplets of those matrices that need it, by one-sided Jacobi; the others stay as they are.

    Args:
        matrices: float64 (L, n, n), contiguous, the last rows and columns zero beyond those of p and q.
        scratch: float64 (L, 2, n, n).
        p: float64 (L, size, r), contiguous.
        sigma: float64 (L, r), contiguous.
        q: float64 (L, size, r), contiguous.
        needed: int32 (L,).
    """
    n = matrices.shape[-1]
    _exact_triplets[(len(matrices),)](
        matrices, scratch, p, sigma, q, needed, n=n, SIZE=p.shape[1], r=p.shape[2], TILE=min(32, n), DEPTH=_DEPTH,
        HEIGHT=triton.next_power_of_2(n), PAIRS=_PAIRS, SWEEPS=_SWEEPS, COSINE=_COSINE, num_warps=8, num_stages=1,
    )  # fmt: skip
