"""The whitened pairs of one rank in the step on a GPU: `Bucket`'s step, made in the frame of `optim.whitening`.

The passes bring tall matrices into the frame row by row. There the other side's factor F' has no columns that are known
to be orthogonal, since the frame has changed since the step that made them; so its root R' is not known before the
first pass. The momentum N = N^ T with T = R'^-1 / c is known by N^ then, gradient and momentum as they are stored:

    pass 1    the Gram matrix of [F N^]
    between   R of both sides, T of each, the Gram matrix of [F N] from that of [F N^]; then as ever
    pass 2    [F' M'] = [F N^] times what would be done to [F N], its lower half T times that

This is exact for factors of any shape. A step asks only that they have full rank, and that they are the very ones that
the stored products belong to, which their sketch tells: neither orthogonal columns nor known sizes. Rounding grows by
the condition of T, columns scaled: that of the change of the rows' weights since the last step. Weights of m rows
spread by (m / floor)^(1/4) at most, which is 45 for 4096 rows, and they hardly move after the first few steps.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.optim.anchors import MOVED, same_columns
from lightning_rlora.optim.cuda.bucket import Bucket
from lightning_rlora.optim.cuda.small_kernels import cholesky
from lightning_rlora.optim.groups import PairInGroup
from lightning_rlora.optim.two_pass import Moved


class WhitenedBucket(Bucket):
    """The pairs of one rank whose algorithm is whitened."""

    def __init__(
        self,
        pairs: list[PairInGroup],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        hyperparameters: Tensor,
    ) -> None:
        super().__init__(pairs, groups, state, hyperparameters)
        self._curvatures = [entry["curvature"] for entry in self._entries]  # kept, as momenta are
        addresses = [curvature.data_ptr() for curvature in self._curvatures]
        self.passes.aligned = self.passes.aligned and all(address % 16 == 0 for address in addresses)
        self.passes.table[3].copy_(torch.tensor(addresses))

    def owns(self, state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether the optimizer's state still is what the step reads and writes."""
        present = [entry.get("curvature") for entry in self._entries]
        return super().owns(state) and all(map(operator.is_, present, self._curvatures))

    def ready(self) -> bool:
        """Whether the factors that have gradients are of full rank, and those that the momentum belongs to."""
        active = torch.tensor([f.grad is not None for f in self.factors], device=self._device)
        _, inverses = cholesky(self._gram_of_factors())
        self._anchor(self._anchors.flatten(1).norm(dim=1) == 0)  # no step yet
        full_rank = (inverses.diagonal(dim1=1, dim2=2) > 0).all(1)
        return bool(((full_rank & self._stands()) | ~active).all())

    def _stands(self, *_: Any) -> Tensor:
        """Whether the factors are where the last step left them, (sides,); their columns need not be orthogonal."""
        return same_columns(self._sketch(), self._anchors, MOVED[torch.float32])

    def _sketch(self) -> Tensor:
        """Sketches of the factors themselves."""
        return self.passes.sketch()

    def begin(self) -> None:
        """Reads what the host has filled in, and brings the frame of this step."""
        super().begin()
        self.passes.weigh_rows(self._of_sides("curvature_floor"))

    def _of_sides(self, name: str) -> Tensor:
        return self._of_pairs(name).repeat(1, 2, 1).flatten()  # a copy: kernels know of no strides

    def _column_weights(self, gradient_weight: Tensor) -> Tensor:
        """Of N^."""
        return gradient_weight.expand(-1, 2, self._rank)

    def _along(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of Gram matrices of [factor N^]; and T of each side."""
        r = self._rank
        roots, inverses = cholesky(n[:, :r, :r])
        others = inverses.unflatten(0, (-1, 2)).flip(1)
        self._turns = (others / self._of_pairs("scaling").unsqueeze(1)).flatten(0, 1)
        beside = n[:, :, r:] @ self._turns
        return roots, inverses, inverses.mT @ beside[:, :r], self._turns.mT @ beside[:, r:]

    def _combinations(self, moved: Moved) -> Tensor:
        """What makes [F' M'] of [F N^], M' being the products with the factors: c M A'^T and c B'^T M."""
        r, sizes = self._rank, moved.sizes.unsqueeze(1)
        # M V' = M_A' + U' (U'^T M V') with U' the first columns over their sizes
        moved.left[:, :, r:] += moved.left[:, :, :r] / sizes @ moved.along
        t = super()._combinations(moved)
        t[:, :, r:] *= (self._of_pairs("scaling") * sizes).repeat_interleave(2, 0)
        t[:, r:] = self._turns @ t[:, r:]
        return t

    def _apply(self, skip: Tensor) -> None:
        decays, at_bases = self._of_sides("curvature_decay"), (self._weights.unsqueeze(2) * self._turns).float()
        self.passes.apply(self._weights, self._kept, self._t, skip, decays, at_bases)

    def _record(self, of_sides: Tensor) -> None:
        self._anchor(of_sides)
