"""Triton kernels of the fast step: the two passes over tall factors.

Tall matrices stay where they are. Kernels find them through a table of addresses, so adapters of different shapes go
through one launch, and no adapter is ever copied. A *side* is one factor with its gradient and its momentum: even sides
are B and its like, (rows, r) and contiguous; odd sides are A and its like, stored as (r, rows). Sums are taken in a
fixed order: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _address(table, index, ALIGNED: tl.constexpr):
    pointer = tl.load(table + index).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    """A tile of a tall matrix: (rows, columns) of B, (columns, rows) of A. Zero outside."""
    if IS_A:
        inside = (columns < r)[:, None] & (rows < height)[None, :]
        tile = tl.load(pointer + columns[:, None] * height + rows[None, :], mask=inside, other=0.0)
    else:
        inside = (rows < height)[:, None] & (columns < r)[None, :]
        tile = tl.load(pointer + rows[:, None] * r + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _store(pointer, tile, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    if IS_A:
        inside = (columns < r)[:, None] & (rows < height)[None, :]
        tl.store(pointer + columns[:, None] * height + rows[None, :], tile, mask=inside)
    else:
        inside = (rows < height)[:, None] & (columns < r)[None, :]
        tl.store(pointer + rows[:, None] * r + columns[None, :], tile, mask=inside)


@triton.jit
def _velocity(gradient, momentum, weights, kept, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    """A tile of the new momentum: the gradient's columns weighted, and the share of the old momentum that is kept."""
    weight = tl.load(weights + columns, mask=columns < r, other=0.0)
    g = _load(gradient, rows, columns, height, r, IS_A)
    m = _load(momentum, rows, columns, height, r, IS_A)
    if IS_A:
        tile = g * weight[:, None] + kept * m
    else:
        tile = g * weight[None, :] + kept * m
    return tile


@triton.jit
def _add_product(x, y, total, IS_A: tl.constexpr):
    """Total + X^T Y, summed in float64, of tiles as `_load` returns them."""
    x = x.to(tl.float64)
    y = y.to(tl.float64)
    if IS_A:
        total = tl.dot(x, tl.trans(y), total, out_dtype=tl.float64)
    else:
        total = tl.dot(tl.trans(x), y, total, out_dtype=tl.float64)
    return total


@triton.jit
def _gram_of_side(
    factor, gradient, momentum, weights, kept, low, high, height, out,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, IS_A: tl.constexpr,
):  # fmt: skip
    """All three blocks in one reading, for ranks up to a tile."""
    columns = tl.arange(0, TILE)
    bb = tl.zeros((TILE, TILE), tl.float64)
    bn = tl.zeros((TILE, TILE), tl.float64)
    nn = tl.zeros((TILE, TILE), tl.float64)
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        b = _load(factor, rows, columns, height, r, IS_A)
        n = _velocity(gradient, momentum, weights, kept, rows, columns, height, r, IS_A)
        bb = _add_product(b, b, bb, IS_A)
        bn = _add_product(b, n, bn, IS_A)
        nn = _add_product(n, n, nn, IS_A)
    entries = columns[:, None] * TILE + columns[None, :]
    tl.store(out + entries, bb)
    tl.store(out + TILE * TILE + entries, bn)
    tl.store(out + 2 * TILE * TILE + entries, nn)


@triton.jit
def _gram_one_tile(
    table, sides, weights, kept, heights, item_side, item_low, out, chunk,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    side = tl.load(item_side + item)
    low = tl.multiple_of(tl.load(item_low + item), 16)
    height = tl.load(heights + side)
    if ALIGNED:
        height = tl.multiple_of(height, 16)
    if tl.load(table + sides + side) == 0:  # no gradient this time
        return
    high = tl.minimum(low + chunk, height)
    factor = _address(table, side, ALIGNED)
    gradient = _address(table, sides + side, ALIGNED)
    momentum = _address(table, 2 * sides + side, ALIGNED)
    weights += side * r
    share = tl.load(kept + side)
    out += item.to(tl.int64) * 3 * TILE * TILE
    if side % 2 == 0:
        _gram_of_side(factor, gradient, momentum, weights, share, low, high, height, out, r, TILE, BLOCK, False)
    else:
        _gram_of_side(factor, gradient, momentum, weights, share, low, high, height, out, r, TILE, BLOCK, True)


@triton.jit
def _gram_of_tiles(
    factor, gradient, momentum, weights, kept, low, high, height, x_columns, y_columns,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    IS_A: tl.constexpr, X_IS_NEW: tl.constexpr, Y_IS_NEW: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((TILE, TILE), tl.float64)
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        if X_IS_NEW:
            x = _velocity(gradient, momentum, weights, kept, rows, x_columns, height, r, IS_A)
        else:
            x = _load(factor, rows, x_columns, height, r, IS_A)
        if Y_IS_NEW:
            y = _velocity(gradient, momentum, weights, kept, rows, y_columns, height, r, IS_A)
        else:
            y = _load(factor, rows, y_columns, height, r, IS_A)
        total = _add_product(x, y, total, IS_A)
    return total


@triton.jit
def _gram_of_kind(
    f, g, m, w, share, low, high, height, i, j, x, y,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PER_MATRIX: tl.constexpr, IS_A: tl.constexpr,
):  # fmt: skip
    """Tiles x <= y of [B N]: both of B, one of each, or both of N."""
    if y < PER_MATRIX:
        total = _gram_of_tiles(f, g, m, w, share, low, high, height, i, j, r, TILE, BLOCK, IS_A, False, False)
    elif x < PER_MATRIX:
        total = _gram_of_tiles(f, g, m, w, share, low, high, height, i, j, r, TILE, BLOCK, IS_A, False, True)
    else:
        total = _gram_of_tiles(f, g, m, w, share, low, high, height, i, j, r, TILE, BLOCK, IS_A, True, True)
    return total


@triton.jit
def _gram_many_tiles(
    table, sides, weights, kept, heights, item_side, item_low, x_tile, y_tile, out, chunk,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One pair of tiles of [B N] an instance, for larger ranks."""
    pair = tl.program_id(0) % PAIRS
    item = tl.program_id(0) // PAIRS
    side = tl.load(item_side + item)
    low = tl.multiple_of(tl.load(item_low + item), 16)
    height = tl.load(heights + side)
    if ALIGNED:
        height = tl.multiple_of(height, 16)
    if tl.load(table + sides + side) == 0:
        return
    high = tl.minimum(low + chunk, height)
    PER_MATRIX: tl.constexpr = (r + TILE - 1) // TILE
    x = tl.load(x_tile + pair)
    y = tl.load(y_tile + pair)
    entry = tl.arange(0, TILE)
    i = (x % PER_MATRIX) * TILE + entry
    j = (y % PER_MATRIX) * TILE + entry
    f = _address(table, side, ALIGNED)
    g = _address(table, sides + side, ALIGNED)
    m = _address(table, 2 * sides + side, ALIGNED)
    w = weights + side * r
    share = tl.load(kept + side)
    if side % 2 == 0:
        total = _gram_of_kind(f, g, m, w, share, low, high, height, i, j, x, y, r, TILE, BLOCK, PER_MATRIX, False)
    else:
        total = _gram_of_kind(f, g, m, w, share, low, high, height, i, j, x, y, r, TILE, BLOCK, PER_MATRIX, True)
    out += (item.to(tl.int64) * PAIRS + pair) * TILE * TILE
    tl.store(out + entry[:, None] * TILE + entry[None, :], total)


@triton.jit
def _gram_sum(
    partial, item_start, table, sides, x_tile, y_tile, out, r: tl.constexpr, TILE: tl.constexpr, PAIRS: tl.constexpr
):
    """The Gram matrix (2r, 2r) of a side from the sums over its chunks of rows, in the order of the rows."""
    side = tl.program_id(0) // PAIRS
    pair = tl.program_id(0) % PAIRS
    entry = tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float64)
    if tl.load(table + sides + side) != 0:
        first = tl.load(item_start + side)
        tile = partial + (first.to(tl.int64) * PAIRS + pair) * TILE * TILE
        for _ in range(tl.load(item_start + side + 1) - first):
            total += tl.load(tile + entry[:, None] * TILE + entry[None, :])
            tile += PAIRS * TILE * TILE
    PER_MATRIX: tl.constexpr = (r + TILE - 1) // TILE
    x = tl.load(x_tile + pair)
    y = tl.load(y_tile + pair)
    x_inside = (x % PER_MATRIX) * TILE + entry
    y_inside = (y % PER_MATRIX) * TILE + entry
    i = (x // PER_MATRIX) * r + x_inside
    j = (y // PER_MATRIX) * r + y_inside
    inside = (x_inside < r)[:, None] & (y_inside < r)[None, :]
    out += side.to(tl.int64) * 4 * r * r
    tl.store(out + i[:, None] * 2 * r + j[None, :], total, mask=inside)
    if x != y:
        tl.store(out + j[None, :] * 2 * r + i[:, None], total, mask=inside)


@triton.jit
def _add_applied(tile, t, total, IS_A: tl.constexpr, PRECISION: tl.constexpr):
    """Total + tile T, or for A its transpose."""
    if PRECISION == "float64":
        tile = tile.to(tl.float64)
        t = t.to(tl.float64)
        if IS_A:
            total = tl.dot(tl.trans(t), tile, total, out_dtype=tl.float64)
        else:
            total = tl.dot(tile, t, total, out_dtype=tl.float64)
    else:
        if IS_A:
            total = tl.dot(tl.trans(t), tile, total, input_precision=PRECISION)
        else:
            total = tl.dot(tile, t, total, input_precision=PRECISION)
    return total


@triton.jit
def _apply_to_side(
    factor, gradient, momentum, weights, kept, low, high, height, t,
    r: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, IS_A: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, TILE)
    SUM: tl.constexpr = tl.float64 if PRECISION == "float64" else tl.float32
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        if IS_A:
            change = tl.zeros((TILE, BLOCK), SUM)
            carried = tl.zeros((TILE, BLOCK), SUM)
        else:
            change = tl.zeros((BLOCK, TILE), SUM)
            carried = tl.zeros((BLOCK, TILE), SUM)
        for first in tl.static_range(0, TILE, DEPTH):
            inner = first + tl.arange(0, DEPTH)
            b = _load(factor, rows, inner, height, r, IS_A)
            n = _velocity(gradient, momentum, weights, kept, rows, inner, height, r, IS_A)
            inside = (inner < r)[:, None] & (columns < r)[None, :]
            entries = t + inner[:, None] * 2 * r + columns[None, :]
            change = _add_applied(b, tl.load(entries, mask=inside, other=0.0), change, IS_A, PRECISION)
            carried = _add_applied(b, tl.load(entries + r, mask=inside, other=0.0), carried, IS_A, PRECISION)
            entries += 2 * r * r
            change = _add_applied(n, tl.load(entries, mask=inside, other=0.0), change, IS_A, PRECISION)
            carried = _add_applied(n, tl.load(entries + r, mask=inside, other=0.0), carried, IS_A, PRECISION)
        moved = _load(factor, rows, columns, height, r, IS_A) + change.to(tl.float32)
        if TILE > DEPTH:
            tl.debug_barrier()  # every thread has read the rows before any is overwritten
        _store(factor, moved, rows, columns, height, r, IS_A)
        _store(momentum, carried.to(tl.float32), rows, columns, height, r, IS_A)


@triton.jit
def _apply(
    table, sides, weights, kept, heights, item_side, item_low, t, skip, chunk,
    r: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    side = tl.load(item_side + item)
    if tl.load(skip + side // 2) != 0:
        return
    low = tl.multiple_of(tl.load(item_low + item), 16)
    height = tl.load(heights + side)
    if ALIGNED:
        height = tl.multiple_of(height, 16)
    high = tl.minimum(low + chunk, height)
    f = _address(table, side, ALIGNED)
    g = _address(table, sides + side, ALIGNED)
    m = _address(table, 2 * sides + side, ALIGNED)
    w = weights + side * r
    share = tl.load(kept + side)
    t += side.to(tl.int64) * 4 * r * r
    if side % 2 == 0:
        _apply_to_side(f, g, m, w, share, low, high, height, t, r, TILE, DEPTH, BLOCK, False, PRECISION)
    else:
        _apply_to_side(f, g, m, w, share, low, high, height, t, r, TILE, DEPTH, BLOCK, True, PRECISION)


@triton.jit
def _sketch(table, heights, strides, out, k: tl.constexpr, r: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr):
    side = tl.program_id(0)
    height = tl.load(heights + side)
    stride = tl.load(strides + side)
    pointer = tl.load(table + side).to(tl.pointer_type(tl.float32))
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    columns = tl.arange(0, R)
    # an element (row, column) of B lies at row r + column, of A at column height + row
    row_step = tl.where(side % 2 == 0, r, 1)
    column_step = tl.where(side % 2 == 0, 1, height)
    total = tl.zeros((GROUPS, R), tl.float32)
    for i in range((height + stride * k - 1) // (stride * k)):
        rows = (i * k + group) * stride
        inside = ((group < k) & (rows < height))[:, None] & (columns < r)[None, :]
        total += tl.load(pointer + rows[:, None] * row_step + columns[None, :] * column_step, mask=inside, other=0.0)
    inside = (group < k)[:, None] & (columns < r)[None, :]
    tl.store(out + side.to(tl.int64) * k * r + group[:, None] * r + columns[None, :], total, mask=inside)
