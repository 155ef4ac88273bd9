"""The whitened step in plain torch: `batched`'s, made in the frame of `whitening`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlora.optim.anchors import MOVED, refactoring, sketch
from lightning_rlora.optim.batched import Batch
from lightning_rlora.optim.sides import Velocity, combined
from lightning_rlora.optim.whitening import row_squares, row_weights, with_rows


class WhitenedBatch(Batch):
    """One whitened step of all pairs of one rank, dtype, device, and kind of curvature.

    The state's `momentum` is M's products with the factors, c M A^T beside B and c B^T M beside A; `anchor` sketches
    the factors themselves, and `curvature` (rows) is the root mean square of each row of G V or G^T U.

    Factors are left balanced in the frame of the step that made them. Nothing asks for the plain balance: a model sees
    their product, and the next step, in another frame, measures their Gram matrices; it would take one more of these.
    """

    def _framed(self, factors: list[Tensor]) -> list[Tensor]:
        """Factors times the roots of the curvatures."""
        self._sketched = sketch(*factors)
        curvatures = iter(self._stored("curvature"))
        self._curvatures = [torch.stack([next(curvatures) for _ in stack]) for stack in factors]
        floor = self.pairs[0].group["curvature_floor"]
        self._weights = [row_weights(curvature, floor).unsqueeze(-1) for curvature in self._curvatures]
        self._inverses = [weight.reciprocal() for weight in self._weights]
        return [factor.mul_(weight) for factor, weight in zip(factors, self._weights, strict=True)]

    def _gradient_products(self, weight: Tensor) -> list[Tensor]:
        """Before their rows are divided by the roots of the curvatures: so they make the curvatures to come."""
        found = super()._gradient_products(weight)
        self._squares = row_squares(found)
        return found

    def _velocity_of(self, tall: list[Tensor]) -> Velocity:
        return super()._velocity_of([n.mul_(inverse) for n, inverse in zip(tall, self._inverses, strict=True)])

    def _turns(self) -> Tensor:
        """What makes M V and M^T U of the stored products."""
        anchors = torch.stack(self._stored("anchor"))
        changed = refactoring(self._sketched.double(), anchors.double(), MOVED[anchors.dtype])
        # where one factor is another, so is the point that the momentum belonged to
        known = changed.abs().amax((1, 2)) > 0
        changed = changed * (known & known.roll(len(known) // 2))[:, None, None]
        scaling = self._numbers["scaling"]
        return (changed @ self._bases.inverse / torch.cat([scaling, scaling])).mT

    def write(self) -> None:
        """Moves the factors and their state."""
        moved = self._moved()
        r = moved.sizes.shape[-1]
        sizes = moved.sizes.unsqueeze(1)
        # M V' = M_A' + U' (U'^T M V') with U' the first columns over their sizes
        moved.left[:, :, r:] += moved.left[:, :, :r] / sizes @ moved.along
        for side in (moved.left, moved.right):  # c M A'^T = M V' times c and the sizes of A's rows
            side[:, :, r:] *= self._numbers["scaling"] * sizes
        factors, momenta = combined(self._sides.factors, self._velocity, moved)
        for factor, momentum, weight, inverse in zip(factors, momenta, self._weights, self._inverses, strict=True):
            factor *= inverse
            momentum *= weight
        decay = self.pairs[0].group["curvature_decay"]
        curvatures = [
            row
            for curvature, squares in zip(self._curvatures, self._squares, strict=True)
            for row in with_rows(curvature, squares, decay).to(curvature.dtype)
        ]
        old = [*self._factors, *self._stored("momentum"), *self._stored("anchor"), *self._stored("curvature")]
        new = [*self._like_factors(factors), *self._like_factors(momenta), *sketch(*factors), *curvatures]
        torch._foreach_copy_(old, new)
