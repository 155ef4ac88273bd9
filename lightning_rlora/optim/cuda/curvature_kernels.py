"""The curvatures of whitened pairs on a GPU: the frame that they make, and a gradient more in their means."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_rlora.optim.cuda.tiles import _address, _inverses


@triton.jit
def _root(curvature, rows, height, scale, floor):
    """`row_weights` before they are scaled; zero outside."""
    inside = rows < height
    c = tl.load(curvature + rows, mask=inside, other=0.0).to(tl.float64)
    ratio = (c * scale).to(tl.float32)
    return tl.where(inside, tl.sqrt(tl.sqrt(ratio * ratio + floor)), 0.0).to(tl.float64)


@triton.jit
def _row_weights(table, sides, heights, floors, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """`lightning_rlora.optim.whitening.row_weights` of a side an instance, and their inverses."""
    side = tl.program_id(0)
    height = tl.load(heights + side)
    if ALIGNED:
        height = tl.multiple_of(height, 16)
    floor = tl.load(floors + side).to(tl.float32)
    curvature = _address(table, 3 * sides + side, ALIGNED)
    frame = _address(table, 4 * sides + side, ALIGNED)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, height, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        c = tl.load(curvature + rows, mask=rows < height, other=0.0).to(tl.float64)
        total += c * c
    square = tl.sum(total, 0)
    scale = tl.where(square > 0, tl.sqrt(height / tl.where(square > 0, square, 1.0)), 0.0)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, height, BLOCK):
        total += _root(curvature, start + tl.arange(0, BLOCK), height, scale, floor)
    per_mean = height / tl.sum(total, 0)
    for start in range(0, height, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        weights = (_root(curvature, rows, height, scale, floor) * per_mean).to(tl.float32)  # ones where all are equal
        tl.store(frame + rows, weights, mask=rows < height)
        tl.store(_inverses(frame, height) + rows, 1 / weights, mask=rows < height)


@triton.jit
def _add_to_curvature(curvature, seen, decay, rows, height):
    """`lightning_rlora.optim.whitening.with_rows` of a tile of products with the other side's orthonormal basis."""
    seen = seen.to(tl.float64)
    squares = tl.sum(seen * seen, 1)
    old = tl.load(curvature + rows, mask=rows < height, other=0.0).to(tl.float64)
    new = tl.sqrt(decay * old * old + (1 - decay) * squares)
    tl.store(curvature + rows, new.to(tl.float32), mask=rows < height)
