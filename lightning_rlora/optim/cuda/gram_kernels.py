"""The first pass over tall factors: the Gram matrix of [F N], F the factor of a side and N its new momentum.

Sums are taken in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_rlora.optim.cuda.tiles import _address, _factor, _velocity


@triton.jit
def _add_product(x, y, total):
    """Total + X^T Y, summed in float64."""
    return tl.dot(tl.trans(x.to(tl.float64)), y.to(tl.float64), total, out_dtype=tl.float64)


@triton.jit
def _gram_of_side(
    factor, gradient, momentum, weights, kept, frame, low, high, height, out,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, IS_A: tl.constexpr,
):  # fmt: skip
    """All three blocks in one reading, for ranks up to a tile."""
    columns = tl.arange(0, TILE)
    bb = tl.zeros((TILE, TILE), tl.float64)
    bn = tl.zeros((TILE, TILE), tl.float64)
    nn = tl.zeros((TILE, TILE), tl.float64)
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        b = _factor(factor, frame, rows, columns, height, r, IS_A)
        n = _velocity(gradient, momentum, weights, kept, frame, rows, columns, height, r, IS_A)
        bb = _add_product(b, b, bb)
        bn = _add_product(b, n, bn)
        nn = _add_product(n, n, nn)
    entries = columns[:, None] * TILE + columns[None, :]
    tl.store(out + entries, bb)
    tl.store(out + TILE * TILE + entries, bn)
    tl.store(out + 2 * TILE * TILE + entries, nn)


@triton.jit
def _gram_one_tile(
    table, sides, weights, kept, heights, item_side, item_low, out, chunk,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, WHITENED: tl.constexpr,
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
    frame = None
    if WHITENED:
        frame = _address(table, 4 * sides + side, ALIGNED)
    weights += side * r
    share = tl.load(kept + side)
    out += item.to(tl.int64) * 3 * TILE * TILE
    if side % 2 == 0:
        _gram_of_side(factor, gradient, momentum, weights, share, frame, low, high, height, out, r, TILE, BLOCK, False)
    else:
        _gram_of_side(factor, gradient, momentum, weights, share, frame, low, high, height, out, r, TILE, BLOCK, True)


@triton.jit
def _gram_of_tiles(
    factor, gradient, momentum, weights, kept, frame, low, high, height, x_columns, y_columns,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    IS_A: tl.constexpr, X_IS_NEW: tl.constexpr, Y_IS_NEW: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((TILE, TILE), tl.float64)
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        if X_IS_NEW:
            x = _velocity(gradient, momentum, weights, kept, frame, rows, x_columns, height, r, IS_A)
        else:
            x = _factor(factor, frame, rows, x_columns, height, r, IS_A)
        if Y_IS_NEW:
            y = _velocity(gradient, momentum, weights, kept, frame, rows, y_columns, height, r, IS_A)
        else:
            y = _factor(factor, frame, rows, y_columns, height, r, IS_A)
        total = _add_product(x, y, total)
    return total


@triton.jit
def _gram_of_kind(
    f, g, m, w, share, frame, low, high, height, i, j, x, y,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PER_MATRIX: tl.constexpr, IS_A: tl.constexpr,
):  # fmt: skip
    """Tiles x <= y of [B N]: both of B, one of each, or both of N."""
    if y < PER_MATRIX:
        total = _gram_of_tiles(f, g, m, w, share, frame, low, high, height, i, j, r, TILE, BLOCK, IS_A, False, False)
    elif x < PER_MATRIX:
        total = _gram_of_tiles(f, g, m, w, share, frame, low, high, height, i, j, r, TILE, BLOCK, IS_A, False, True)
    else:
        total = _gram_of_tiles(f, g, m, w, share, frame, low, high, height, i, j, r, TILE, BLOCK, IS_A, True, True)
    return total


@triton.jit
def _gram_many_tiles(
    table, sides, weights, kept, heights, item_side, item_low, x_tile, y_tile, out, chunk,
    r: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr, ALIGNED: tl.constexpr,
    WHITENED: tl.constexpr,
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
    frame = None
    if WHITENED:
        frame = _address(table, 4 * sides + side, ALIGNED)
    w = weights + side * r
    share = tl.load(kept + side)
    if side % 2 == 0:
        total = _gram_of_kind(
            f, g, m, w, share, frame, low, high, height, i, j, x, y, r, TILE, BLOCK, PER_MATRIX, False
        )
    else:
        total = _gram_of_kind(f, g, m, w, share, frame, low, high, height, i, j, x, y, r, TILE, BLOCK, PER_MATRIX, True)
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
