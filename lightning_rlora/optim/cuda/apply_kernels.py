"""The second pass over tall factors: the new factor and momentum of each side, in place; and the factors' sketches."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_rlora.optim.cuda.curvature_kernels import _add_to_curvature
from lightning_rlora.optim.cuda.tiles import _address, _factor, _inverses, _load, _of_rows, _store, _velocity


@triton.jit
def _in_tf32(x):
    """X rounded to the bits that TF32 has, and the rest."""
    rounded = ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)
    return rounded, x - rounded


@triton.jit
def _add_applied(tile, t, total, FLOAT64: tl.constexpr):
    """Total + tile T, in float64 or in three products of TF32.

    Those are Triton's "tf32x3" without its care for infinities, a third of its instructions: steps that meet any are
    skipped.
    """
    if FLOAT64:
        total = tl.dot(tile.to(tl.float64), t.to(tl.float64), total, out_dtype=tl.float64)
    else:
        tile, tile_rest = _in_tf32(tile)
        t, t_rest = _in_tf32(t)
        total = tl.dot(tile_rest, t, total, input_precision="tf32")
        total = tl.dot(tile, t_rest, total, input_precision="tf32")
        total = tl.dot(tile, t, total, input_precision="tf32")
    return total


@triton.jit
def _apply_to_side(
    factor, gradient, momentum, weights, kept, frame, curvature, decay, at_basis, low, high, height, t,
    r: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, IS_A: tl.constexpr,
    FLOAT64: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, TILE)
    SUM: tl.constexpr = tl.float64 if FLOAT64 else tl.float32
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        change = tl.zeros((BLOCK, TILE), SUM)
        carried = tl.zeros((BLOCK, TILE), SUM)
        seen = tl.zeros((BLOCK, TILE), SUM)
        for first in tl.static_range(0, TILE, DEPTH):
            inner = first + tl.arange(0, DEPTH)
            b = _factor(factor, frame, rows, inner, height, r, IS_A)
            n = _velocity(gradient, momentum, weights, kept, frame, rows, inner, height, r, IS_A)
            inside = (inner < r)[:, None] & (columns < r)[None, :]
            entries = t + inner[:, None] * 2 * r + columns[None, :]
            change = _add_applied(b, tl.load(entries, mask=inside, other=0.0), change, FLOAT64)
            carried = _add_applied(b, tl.load(entries + r, mask=inside, other=0.0), carried, FLOAT64)
            entries += 2 * r * r
            change = _add_applied(n, tl.load(entries, mask=inside, other=0.0), change, FLOAT64)
            carried = _add_applied(n, tl.load(entries + r, mask=inside, other=0.0), carried, FLOAT64)
            if frame is not None:
                g = _load(gradient, rows, inner, height, r, IS_A)  # the same as N's, and so read once
                entries = at_basis + inner[:, None] * r + columns[None, :]
                seen = _add_applied(g, tl.load(entries, mask=inside, other=0.0), seen, FLOAT64)
        change = change.to(tl.float32)
        carried = carried.to(tl.float32)
        if frame is not None:
            _add_to_curvature(curvature, seen, decay, rows, height)
            change *= _of_rows(_inverses(frame, height), rows, height)
            carried *= _of_rows(frame, rows, height)
        moved = _load(factor, rows, columns, height, r, IS_A) + change
        if TILE > DEPTH:
            tl.debug_barrier()  # every thread has read the rows before any is overwritten
        _store(factor, moved, rows, columns, height, r, IS_A)
        _store(momentum, carried, rows, columns, height, r, IS_A)


@triton.jit
def _apply(
    table, sides, weights, kept, heights, item_side, item_low, t, skip, chunk, decays, at_bases,
    r: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    FLOAT64: tl.constexpr, WHITENED: tl.constexpr,
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
    frame, c, decay = None, None, None
    if WHITENED:
        frame = _address(table, 4 * sides + side, ALIGNED)
        c = _address(table, 3 * sides + side, ALIGNED)
        decay = tl.load(decays + side)
        at_bases += side.to(tl.int64) * r * r
    if side % 2 == 0:
        _apply_to_side(
            f, g, m, w, share, frame, c, decay, at_bases, low, high, height, t, r, TILE, DEPTH, BLOCK, False, FLOAT64
        )
    else:
        _apply_to_side(
            f, g, m, w, share, frame, c, decay, at_bases, low, high, height, t, r, TILE, DEPTH, BLOCK, True, FLOAT64
        )


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
