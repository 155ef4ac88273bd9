"""The curvatures of whitened pairs on a GPU: the frame that they make, and a gradient more in their means."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_rlora.optim.cuda.tiles import _address, _gradient


@triton.jit
def _root(curvature, rows, height, mean_square, floor):
    """`row_weights` before they are scaled; zero outside."""
    inside = rows < height
    c = tl.load(curvature + rows, mask=inside, other=0.0).to(tl.float64)
    share = tl.where(mean_square > 0, c * c / tl.where(mean_square > 0, mean_square, 1.0), 0.0)
    return tl.where(inside, tl.sqrt(tl.sqrt((share + floor).to(tl.float32))), 0.0).to(tl.float64)


@triton.jit
def _row_weights(table, sides, heights, floors, BLOCK: tl.constexpr):
    """`lightning_rlora.optim.whitening.row_weights` of a side an instance."""
    side = tl.program_id(0)
    height = tl.load(heights + side)
    floor = tl.load(floors + side)
    curvature = _address(table, 3 * sides + side, False)
    frame = _address(table, 4 * sides + side, False)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, height, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        c = tl.load(curvature + rows, mask=rows < height, other=0.0).to(tl.float64)
        total += c * c
    mean_square = tl.sum(total, 0) / height
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, height, BLOCK):
        total += _root(curvature, start + tl.arange(0, BLOCK), height, mean_square, floor)
    mean = tl.sum(total, 0) / height
    for start in range(0, height, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        weights = _root(curvature, rows, height, mean_square, floor) / mean  # exactly ones where all roots are equal
        tl.store(frame + rows, weights.to(tl.float32), mask=rows < height)


@triton.jit
def _add_to_curvature(
    curvature, gradient, weights, decay, at_basis, low, high, height,
    r: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr, IS_A: tl.constexpr,
):  # fmt: skip
    """`lightning_rlora.optim.whitening.with_rows` of the gradient's products with the other side's orthonormal basis.

    In a loop of its own before that of the second pass: in one, each tile would take shared memory from the other, and
    the gradient is read again from the cache.
    """
    columns = tl.arange(0, TILE)
    for start in range(low, high, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        seen = tl.zeros((BLOCK, TILE), tl.float32)
        for first in tl.static_range(0, TILE, DEPTH):
            inner = first + tl.arange(0, DEPTH)
            g = _gradient(gradient, weights, rows, inner, height, r, IS_A)
            inside = (inner < r)[:, None] & (columns < r)[None, :]
            t = tl.load(at_basis + inner[:, None] * r + columns[None, :], mask=inside, other=0.0)
            seen = tl.dot(g, t, seen, input_precision="tf32x3")
        seen = seen.to(tl.float64)
        squares = tl.sum(seen * seen, 1)
        old = tl.load(curvature + rows, mask=rows < height, other=0.0).to(tl.float64)
        new = tl.sqrt(decay * old * old + (1 - decay) * squares)
        tl.store(curvature + rows, new.to(tl.float32), mask=rows < height)
