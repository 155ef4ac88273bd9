"""The two passes over tall factors on a GPU: how they are cut into work, and their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lightning_rlora.optim.anchors import sketch_rows, sketch_stride
from lightning_rlora.optim.cuda.apply_kernels import _apply, _sketch
from lightning_rlora.optim.cuda.curvature_kernels import _row_weights
from lightning_rlora.optim.cuda.gram_kernels import _gram_many_tiles, _gram_one_tile, _gram_sum


class _Items(NamedTuple):
    """The work of a pass in chunks of rows: side and first row of each chunk, and where each side's chunks start."""

    side: Tensor
    low: Tensor
    start: Tensor
    chunk: int

    @classmethod
    def of(cls, heights: list[int], chunk: int, device: torch.device) -> _Items:
        chunks = [(side, low) for side, height in enumerate(heights) for low in range(0, height, chunk)]
        side, low = torch.tensor(chunks, dtype=torch.int32, device=device).T.contiguous()
        counts = [len(range(0, height, chunk)) for height in heights]
        return cls(side, low, torch.tensor([0, *counts], device=device).cumsum(0, dtype=torch.int32), chunk)


class _Plan(NamedTuple):
    """How the passes are cut for a rank: the fastest of those tried on an H200."""

    gram_tile: int
    gram_chunk: int
    gram: dict[str, Any]
    apply: dict[str, Any]

    @classmethod
    def of(cls, rank: int, whitened: bool) -> _Plan:
        tile = max(16, triton.next_power_of_2(rank))
        if tile == 16:
            gram = {"BLOCK": 64, "num_warps": 1, "num_stages": 2}
            return cls(16, 1024, gram, {"BLOCK": 64, "DEPTH": 16, "FLOAT64": False, "num_warps": 2, "num_stages": 2})
        if tile == 32:
            gram = {"BLOCK": 32, "num_warps": 2, "num_stages": 3}
            return cls(32, 1024, gram, {"BLOCK": 64, "DEPTH": 32, "FLOAT64": True, "num_warps": 4})
        gram = {"BLOCK": 16, "num_warps": 4, "num_stages": 3}
        if tile == 64:
            block = 16 if whitened else 32  # their third sum does not fit into the registers beside 32 rows
            apply = {"BLOCK": block, "DEPTH": 64, "FLOAT64": True, "num_warps": 4, "num_stages": 2}
        else:
            apply = {"BLOCK": 32, "DEPTH": 32, "FLOAT64": True, "num_warps": 8, "num_stages": 2}
        return cls(64, 4096, gram, apply)


class TallPasses:
    """The passes of a step over all pairs of one rank on one device, whatever their shapes.

    Args:
        heights: Rows of each side, m of pair 0, n of pair 0, m of pair 1, ...
        rank: r.
        device: Of the factors.
        aligned: Whether every address will be a multiple of 16 bytes and every height is one of 16.
        whitened: Whether the pairs have curvatures. Then F and N below are those of the frame, rows of a factor times
            the weights of `weigh_rows` and rows of gradient and momentum over them; and back in what is written.

    Attributes:
        table: Addresses, int64 (3, sides): of factors, of their gradients (zero where there is none) and of momenta; of
            whitened pairs (5, sides), then those of curvatures and of the rows' weights, which are filled in. The
            others are to be filled in by the caller.
        aligned: As given; may be changed between passes.
    """

    def __init__(self, heights: list[int], rank: int, device: torch.device, *, aligned: bool, whitened: bool) -> None:
        self._rank, self.aligned, self._whitened = rank, aligned, whitened
        self._plan = _Plan.of(rank, whitened)
        self._sides = len(heights)
        self.table = torch.zeros(5 if whitened else 3, len(heights), dtype=torch.int64, device=device)
        if whitened:
            padded = [2 * (height + -height % 16) for height in heights]  # weights and their inverses
            self._row_weights = torch.ones(sum(padded), device=device).split(padded)
            self.table[4].copy_(torch.tensor([weights.data_ptr() for weights in self._row_weights]))
        self._heights = torch.tensor(heights, dtype=torch.int32, device=device)
        self._gram_items = _Items.of(heights, self._plan.gram_chunk, device)
        self._apply_items = _Items.of(heights, 1024, device)
        self._sketch_rows = sketch_rows(rank)
        self._strides = torch.tensor([sketch_stride(height, rank) for height in heights], dtype=torch.int32).to(device)
        count = 2 * -(-rank // self._plan.gram_tile)
        tiles = [(x, y) for x in range(count) for y in range(x, count)]
        self._x_tile, self._y_tile = torch.tensor(tiles, dtype=torch.int32).T.contiguous().to(device)

    def weigh_rows(self, floors: Tensor) -> None:
        """Brings the frame of what follows: `lightning_rlora.optim.whitening.row_weights` of each side's curvature.

        Args:
            floors: float64 (sides,).
        """
        _row_weights[(self._sides,)](
            self.table, self._sides, self._heights, floors, BLOCK=4096, ALIGNED=self.aligned, num_warps=8
        )

    def gram(self, weights: Tensor, kept: Tensor) -> Tensor:
        """The Gram matrices (sides, 2r, 2r) of [F N], N = gradient diag(weights) + kept momentum, float64.

        Args:
            weights: float32 (sides, r).
            kept: float32 (sides,).
        """
        r, tile, work, pairs = self._rank, self._plan.gram_tile, self._gram_items, len(self._x_tile)
        partial = weights.new_empty(len(work.side), pairs, tile, tile, dtype=torch.float64)
        out = weights.new_empty(self._sides, 2 * r, 2 * r, dtype=torch.float64)
        common = (self.table, self._sides, weights, kept, self._heights, work.side, work.low)
        options = {"r": r, "TILE": tile, "ALIGNED": self.aligned, "WHITENED": self._whitened}
        options |= self._plan.gram
        if r <= tile <= 32:
            _gram_one_tile[(len(work.side),)](*common, partial, work.chunk, **options)
        else:
            grid = (len(work.side) * pairs,)
            _gram_many_tiles[grid](*common, self._x_tile, self._y_tile, partial, work.chunk, PAIRS=pairs, **options)
        _gram_sum[(self._sides * pairs,)](
            partial, work.start, self.table, self._sides, self._x_tile, self._y_tile, out, r=r, TILE=tile, PAIRS=pairs
        )
        return out

    def apply(
        self,
        weights: Tensor,
        kept: Tensor,
        t: Tensor,
        skip: Tensor,
        decays: Tensor | None = None,
        at_bases: Tensor | None = None,
    ) -> None:
        """[F M] <- [F + change, M'] with [change, M'] = [F N] T, in place, N as in `gram`.

        Args:
            weights: float32 (sides, r).
            kept: float32 (sides,).
            t: float32 (sides, 2r, 2r).
            skip: int32 (pairs,); pairs with anything but zero are left alone.
            decays: Of whitened pairs, float64 (sides,): the share of the curvatures' mean squares that is kept.
            at_bases: Of whitened pairs, float32 (sides, r, r): what makes of the gradient its products with the other
                side's orthonormal basis; the squares of their rows enter the curvature.
        """
        r, work = self._rank, self._apply_items
        _apply[(len(work.side),)](
            self.table, self._sides, weights, kept, self._heights, work.side, work.low, t, skip, work.chunk,
            decays, at_bases, r=r, TILE=max(16, triton.next_power_of_2(r)), ALIGNED=self.aligned,
            WHITENED=self._whitened, **self._plan.apply,
        )  # fmt: skip

    def sketch(self) -> Tensor:
        """`lightning_rlora.optim.anchors.sketch` of every factor, (sides, k, r)."""
        k, r = self._sketch_rows, self._rank
        out = torch.empty(self._sides, k, r, device=self.table.device)
        groups = 8
        _sketch[(self._sides, triton.cdiv(k, groups))](
            self.table, self._heights, self._strides, out,
            k=k, r=r, GROUPS=groups, R=triton.next_power_of_2(r), num_warps=1 if r <= 32 else 4,
        )  # fmt: skip
        return out
