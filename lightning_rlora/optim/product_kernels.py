"""Triton kernels for matrices too large for registers: whole loops of products, one matrix an instance.

An instance keeps its matrix in global memory, which for these sizes means the cache, and waits for its own threads only
(`tl.debug_barrier`), so each matrix takes as many rounds as it needs and the host never asks. Sizes are multiples of
the tile: callers fill up with zeros, which stay zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from lightning_rlora.optim.small_kernels import _jacobi, _rotate, warps

TILE = 64
_DEPTH = 16
_PAIRS = 8
_SWEEPS = 30
_COSINE = 1e-10


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


@triton.jit
def _orthogonalise(
    columns, n: tl.constexpr, HEIGHT: tl.constexpr, PAIRS: tl.constexpr, SWEEPS: tl.constexpr, COSINE: tl.constexpr
):
    """One-sided Jacobi on columns stored as rows: in round t of a tournament column t + i meets column t - i."""
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
    for i in range(n // TILE):
        for j in range(n // TILE):
            tl.store(columns + _entries(j, i, n, TILE), tl.trans(tl.load(matrices + _entries(i, j, n, TILE))))
    tl.debug_barrier()
    _orthogonalise(columns, n, HEIGHT, PAIRS, SWEEPS, COSINE)
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
    for i in range(n // TILE):
        for j in range(n // TILE):
            tl.store(columns + _entries(j, i, n, TILE), tl.trans(tl.load(matrices + _entries(i, j, n, TILE))))
    tl.debug_barrier()
    _orthogonalise(columns, n, HEIGHT, PAIRS, SWEEPS, COSINE)
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


def orthogonal_columns(x: Tensor, cosine: float) -> Tensor:
    """The same function of `small_kernels` up to a cosine, in float32 or float64, for any size up to 128.

    Args:
        x: (L, r, r).
        cosine: Done after a sweep that met no larger one; what is left is of the order of its square.

    Returns:
        (L, r, r) or, for an odd r, (L, r, r + 1) with one column of zeros.
    """
    r = x.shape[-1]
    columns = nn.functional.pad(x.mT, (0, 0, 0, r % 2)).clone(memory_format=torch.contiguous_format)
    n, height = columns.shape[1:]
    _jacobi[(len(x),)](
        columns, n=n, height=height, HALF=triton.next_power_of_2(n // 2), HEIGHT=triton.next_power_of_2(height),
        TOLERANCE=cosine, SWEEPS=20, num_warps=4 if n <= 64 else (8 if x.dtype == torch.float32 else 16),
    )  # fmt: skip
    return columns.mT
