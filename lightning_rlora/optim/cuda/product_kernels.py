"""Triton kernels for matrices too large for registers: whole loops of products, one matrix an instance.

An instance keeps its matrix in global memory, which for these sizes means the cache, and waits for its own threads only
(`tl.debug_barrier`), so each matrix takes as many rounds as it needs and the host never asks. Sizes are multiples of
the tile: callers fill up with zeros, which stay zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_rlora.optim.cuda.small_kernels import warps

TILE = 64
_DEPTH = 16


@triton.jit
def _product(x, y, i, j, n: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr):
    """Tile (i, j) of X Y, or of X^T Y."""
    rows = i * TILE + tl.arange(0, TILE)
    columns = j * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float64)
    for start in range(0, n, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        b = tl.load(y + inner[:, None] * n + columns[None, :])
        if TURNED:
            a = tl.load(x + inner[:, None] * n + rows[None, :])
            total = tl.dot(tl.trans(a), b, total, out_dtype=tl.float64)
        else:
            a = tl.load(x + rows[:, None] * n + inner[None, :])
            total = tl.dot(a, b, total, out_dtype=tl.float64)
    return total


@triton.jit
def _entries(i, j, n: tl.constexpr, TILE: tl.constexpr):
    return (i * TILE + tl.arange(0, TILE))[:, None] * n + (j * TILE + tl.arange(0, TILE))[None, :]


@triton.jit
def _purify(
    buffers, traces, squares, skip, rank, n: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    STEPS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    if tl.load(skip + item) != 0:
        return
    buffers += item * 2 * n * n
    trace = tl.load(traces + item)
    square = tl.load(squares + item)
    step = 0
    while (trace - square > LIMIT) & (step < STEPS):
        x = buffers + (step % 2) * n * n
        out = buffers + (1 - step % 2) * n * n
        widen = tl.abs(square - rank) > tl.abs(2 * trace - square - rank)
        trace = trace * 0
        square = square * 0
        for i in range(n // TILE):
            for j in range(i + 1):
                product = _product(x, x, i, j, n, TILE, DEPTH, False)
                old = tl.load(x + _entries(i, j, n, TILE))
                new = tl.where(widen, 2 * old - product, product)
                tl.store(out + _entries(i, j, n, TILE), new)
                norm = tl.sum(tl.sum(new * new, 1), 0)
                if i == j:
                    place = tl.arange(0, TILE)
                    on = tl.where(place[:, None] == place[None, :], new, 0.0)
                    trace += tl.sum(tl.sum(on, 1), 0)
                    square += norm
                else:
                    tl.store(out + _entries(j, i, n, TILE), tl.trans(new))
                    square += 2 * norm
        tl.debug_barrier()
        step += 1
    if step % 2 == 1:
        for i in range(n // TILE):
            for j in range(n // TILE):
                entries = _entries(i, j, n, TILE)
                tl.store(buffers + entries, tl.load(buffers + n * n + entries))
    tl.store(traces + item, trace)
    tl.store(squares + item, square)


def purify(buffers: Tensor, traces: Tensor, squares: Tensor, skip: Tensor, rank: int, steps: int, limit: float) -> None:
    """Trace-correcting purification, in place, of the symmetric matrices X = buffers[:, 0], eigenvalues in [0, 1].

    Args:
        buffers: float64 (L, 2, n, n); the result takes the place of X, the other half is working memory.
        traces: tr X, float64 (L,), and in the end of the result.
        squares: |X|^2 (Frobenius), likewise.
        skip: int32 (L,); matrices with anything but zero are left alone.
        rank: What the trace shall be.
        steps: At most so many products.
        limit: Done when tr X - |X|^2 is at most this.
    """
    n = buffers.shape[-1]
    _purify[(len(buffers),)](
        buffers, traces, squares, skip, rank, n=n, TILE=min(TILE, n), DEPTH=_DEPTH, STEPS=steps, LIMIT=limit,
        num_warps=8, num_stages=3,
    )  # fmt: skip


@triton.jit
def _odd_polynomials(
    source, buffers, defects, coefficients, n: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
    FEW: tl.constexpr, MANY: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0).to(tl.int64)
    source += item * n * n
    buffers += item * 4 * n * n
    g = buffers + 2 * n * n
    h = buffers + 3 * n * n
    attempt = 0
    steps = 0
    defect = tl.zeros((), tl.float64)
    while attempt < 2:
        for i in range(n // TILE):
            for j in range(n // TILE):
                tl.store(buffers + _entries(i, j, n, TILE), tl.load(source + _entries(i, j, n, TILE)))
        tl.debug_barrier()
        steps = tl.where(attempt == 0, FEW, MANY)
        for step in range(steps):
            row = coefficients + 3 * (step + attempt * FEW)
            a = tl.load(row)
            b = tl.load(row + 1)
            c = tl.load(row + 2)
            x = buffers + (step % 2) * n * n
            out = buffers + (1 - step % 2) * n * n
            for i in range(n // TILE):
                for j in range(i + 1):
                    product = _product(x, x, i, j, n, TILE, DEPTH, True)
                    tl.store(g + _entries(i, j, n, TILE), product)
                    if i != j:
                        tl.store(g + _entries(j, i, n, TILE), tl.trans(product))
            tl.debug_barrier()
            for i in range(n // TILE):
                for j in range(i + 1):
                    product = _product(g, g, i, j, n, TILE, DEPTH, False)
                    product = c * product + b * tl.load(g + _entries(i, j, n, TILE))
                    tl.store(h + _entries(i, j, n, TILE), product)
                    if i != j:
                        tl.store(h + _entries(j, i, n, TILE), tl.trans(product))
            tl.debug_barrier()
            for i in range(n // TILE):
                for j in range(n // TILE):
                    product = _product(x, h, i, j, n, TILE, DEPTH, False)
                    tl.store(out + _entries(i, j, n, TILE), product + a * tl.load(x + _entries(i, j, n, TILE)))
            tl.debug_barrier()
        defect = defect * 0
        x = buffers + (steps % 2) * n * n
        for i in range(n // TILE):
            for j in range(i + 1):
                product = _product(x, x, i, j, n, TILE, DEPTH, True)
                square = tl.sum(tl.sum(product * product, 1), 0)
                if i == j:
                    place = tl.arange(0, TILE)
                    on = tl.where(place[:, None] == place[None, :], product, 0.0)
                    defect += tl.sum(tl.sum(on, 1), 0) - square
                else:
                    defect -= 2 * square
        tl.debug_barrier()
        attempt = tl.where(defect <= LIMIT, 2, attempt + 1)
    if steps % 2 == 1:
        for i in range(n // TILE):
            for j in range(n // TILE):
                tl.store(buffers + _entries(i, j, n, TILE), tl.load(buffers + n * n + _entries(i, j, n, TILE)))
    tl.store(defects + item, defect)


def odd_polynomials(matrices: Tensor, coefficients: Tensor, few: int, limit: float) -> tuple[Tensor, Tensor]:
    """X <- a X + b X X^T X + c X (X^T X)^2 for row after row a, b, c of the coefficients.

    The first few rows are tried first; matrices whose singular values they do not bring to 0 and 1 start again with the
    other rows.

    Args:
        matrices: X, float64 (L, n, n), contiguous.
        coefficients: float64 (steps, 3), on the device.
        few: How many rows are tried first.
        limit: All is well where tr G - |G|^2 is at most this, G = X^T X.

    Returns:
        The results (L, n, n), and tr G - |G|^2 of each.
    """
    n = matrices.shape[-1]
    buffers, defects = matrices.new_empty(len(matrices), 4, n, n), matrices.new_empty(len(matrices))
    _odd_polynomials[(len(matrices),)](
        matrices, buffers, defects, coefficients, n=n, TILE=min(TILE, n), DEPTH=_DEPTH if n <= TILE else 2 * _DEPTH,
        FEW=few, MANY=len(coefficients) - few, LIMIT=limit, num_warps=warps(n * n // 512, 8), num_stages=3,
    )  # fmt: skip
    return buffers[:, 0], defects
