"""The whitened step in plain torch: `batched`'s, made in the frame of `whitening`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlora.optim.anchors import MOVED, refactoring, sketch
from lightning_rlora.optim.batched import Batch
from lightning_rlora.optim.sides import Sides
from lightning_rlora.optim.whitening import row_weights, with_rows


class WhitenedBatch(Batch):
    """One whitened step of all pairs of one rank, dtype and device.

    The state's `momentum` is M's products with the factors, c M A^T beside B and c B^T M beside A; `anchor` sketches
    the factors themselves, and `curvature` (rows) is the root mean square of each row of G V or G^T U.
    """

    def _framed(self, sides: Sides) -> Sides:
        """Factors times the roots of the curvatures, gradients and momenta over them."""
        self._factors_before = sides.factors
        curvatures = iter(self._stored("curvature"))
        self._curvatures = [torch.stack([next(curvatures) for _ in stack]) for stack in sides.factors]
        floor = self.pairs[0].group["curvature_floor"]
        dtype = sides.factors[0].dtype
        self._weights = [row_weights(curvature, floor).unsqueeze(-1).to(dtype) for curvature in self._curvatures]
        return Sides(
            [x * w for x, w in zip(sides.factors, self._weights, strict=True)],
            [x / w for x, w in zip(sides.gradients, self._weights, strict=True)],
            [x / w for x, w in zip(sides.momenta, self._weights, strict=True)],
        )

    def _gradient_products(self) -> list[Tensor]:
        found = super()._gradient_products()
        decay = self.pairs[0].group["curvature_decay"]
        self._new_curvatures = [
            with_rows(curvature, torch.linalg.vector_norm(x * w, dim=-1, dtype=torch.float64), decay)
            for curvature, x, w in zip(self._curvatures, found, self._weights, strict=True)
        ]
        return found

    def _turns(self) -> Tensor:
        """What makes M V and M^T U of the stored products."""
        anchors = torch.stack(self._stored("anchor"))
        changed = refactoring(sketch(*self._factors_before).double(), anchors.double(), MOVED[anchors.dtype])
        # where one factor is another, so is the point that the momentum belonged to
        known = changed.abs().amax((1, 2)) > 0
        changed = changed * (known & known.roll(len(known) // 2))[:, None, None]
        scaling = self._numbers["scaling"]
        return (changed @ self._bases.inverse / torch.cat([scaling, scaling])).mT

    def write(self) -> None:
        """Moves the factors and their state."""
        factors, momenta, sizes = self._advanced()
        lefts = len(factors) // 2
        of_columns = sizes.unsqueeze(1).to(factors[0].dtype).split([len(stack) for stack in factors[:lefts]])
        scalings = self._numbers["scaling"].to(factors[0].dtype).split([len(stack) for stack in factors[:lefts]])
        for i, (size, scaling) in enumerate(zip(of_columns, scalings, strict=True)):
            left, right = i, i + lefts
            # M V = M_A + U M_B^T V
            along = momenta[right].mT @ factors[right] / size / size.mT
            momenta[left].baddbmm_(factors[left], along)
            for side in (left, right):
                momenta[side] *= scaling * size * self._weights[side]
                factors[side] /= self._weights[side]
        curvatures = [row for stack in self._new_curvatures for row in stack.to(factors[0].dtype)]
        old = [*self._factors, *self._stored("momentum"), *self._stored("anchor"), *self._stored("curvature")]
        new = [*self._like_factors(factors), *self._like_factors(momenta), *sketch(*factors), *curvatures]
        torch._foreach_copy_(old, new)
