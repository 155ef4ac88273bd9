"""Tiles of tall matrices in Triton kernels: where they lie, how they are read and written.

Tall matrices stay where they are. Kernels find them through a table of addresses, so adapters of different shapes go
through one launch, and no adapter is ever copied. A *side* is one factor with its gradient and its momentum: even sides
are B and its like, (rows, r) and contiguous; odd sides are A and its like, stored as (r, rows).

The rows of the table, an address a side each: factors, gradients (zero where there is none), momenta; and for whitened
pairs curvatures, and the weights of rows that bring a tall matrix into the frame of the step (`optim.whitening`), with
their inverses behind them, from the next multiple of 16 on.
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
def _entries(pointer, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    if IS_A:
        entries = pointer + columns[None, :] * height + rows[:, None]
    else:
        entries = pointer + rows[:, None] * r + columns[None, :]
    return entries


@triton.jit
def _load(pointer, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    """A tile (rows, columns) of a tall matrix. Zero outside."""
    inside = (rows < height)[:, None] & (columns < r)[None, :]
    return tl.load(_entries(pointer, rows, columns, height, r, IS_A), mask=inside, other=0.0)


@triton.jit
def _store(pointer, tile, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    inside = (rows < height)[:, None] & (columns < r)[None, :]
    tl.store(_entries(pointer, rows, columns, height, r, IS_A), tile, mask=inside)


@triton.jit
def _inverses(frame, height):
    return frame + tl.cdiv(height, 16) * 16


@triton.jit
def _of_rows(pointer, rows, height):
    """A number of each row, to be multiplied with a tile; ones outside."""
    return tl.load(pointer + rows, mask=rows < height, other=1.0)[:, None]


@triton.jit
def _factor(factor, frame, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    """A tile of the factor, in the frame of a whitened step."""
    tile = _load(factor, rows, columns, height, r, IS_A)
    if frame is not None:
        tile = tile * _of_rows(frame, rows, height)
    return tile


@triton.jit
def _velocity(gradient, momentum, weights, kept, frame, rows, columns, height, r: tl.constexpr, IS_A: tl.constexpr):
    """A tile of the new momentum: the gradient, its columns weighted, and the share kept of the old, in the frame."""
    weight = tl.load(weights + columns, mask=columns < r, other=0.0)
    g = _load(gradient, rows, columns, height, r, IS_A)
    m = _load(momentum, rows, columns, height, r, IS_A)
    tile = g * weight[None, :] + kept * m
    if frame is not None:
        tile = tile * _of_rows(_inverses(frame, height), rows, height)
    return tile
