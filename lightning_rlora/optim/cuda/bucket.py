"""The pairs of one rank in the step on a GPU: where they lie, their small state, and the parts of a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_rlora.errors import UserError
from lightning_rlora.geometry import RANK_TOLERANCE
from lightning_rlora.optim.anchors import MOVED, sketch_rows, stands
from lightning_rlora.optim.cuda import products, small_matrices
from lightning_rlora.optim.cuda.small_kernels import cholesky
from lightning_rlora.optim.cuda.tall_passes import TallPasses
from lightning_rlora.optim.groups import HYPERPARAMETERS, PairInGroup, unit_factors
from lightning_rlora.optim.two_pass import (
    RANGE_FLOOR,
    SMALLEST_SQUARE,
    Direction,
    Half,
    Moved,
    basis_of,
    move,
    orthogonal_direction,
    scaled_direction,
)

_ORTHOGONAL = 1e-5
"""Cosine of two columns up to which factors count as balanced; rounding makes 1e-7."""
_NEARLY_ORTHOGONAL = 1e-2
"""The same for factors as a step left them: a direction that hardly exists in the momentum takes rounding along, and
what is amiss is gone with the next step. Larger cosines mean a change from outside that the sketch has missed."""


class Bucket:
    """The pairs of one rank and algorithm: their tables, their small state, and the parts of a step."""

    def __init__(
        self,
        pairs: list[PairInGroup],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        hyperparameters: Tensor,
    ) -> None:
        first = pairs[0].group
        self._algorithm = first["algorithm"]
        self.simulates_adam = first["algorithm"] == "sgd" and first["simulate_adam"]
        self._rank, self._device = len(pairs[0].a), pairs[0].a.device
        self.factors = [factor for pair in pairs for factor in (pair.b, pair.a)]  # sides: B, A, B, A, ...
        # rotations need no more than registers for small matrices; products are quicker from some size on
        self._polar_factor = (small_matrices if self._rank <= 8 else products).polar_factor
        self._triplets = (small_matrices if self._rank <= 32 else products).leading_triplets
        heights = [factor.numel() // self._rank for factor in self.factors]
        self._entries = [state[factor] for factor in self.factors]
        self._momenta = [entry["momentum"] for entry in self._entries]  # kept: the kernels know only their addresses
        addresses = [[x.data_ptr() for x in tall] for tall in (self.factors, self._momenta)]
        aligned = all(x % 16 == 0 for x in (*heights, *addresses[0], *addresses[1]))
        whitened = self._algorithm == "whitened"
        self.passes = TallPasses(heights, self._rank, self._device, aligned=aligned, whitened=whitened)
        self.passes.table[0].copy_(torch.tensor(addresses[0]))
        self.passes.table[2].copy_(torch.tensor(addresses[1]))
        self._addresses: list[int] = []
        self._copies: list[Tensor | None] = []
        places = {id(group): place for place, group in enumerate(groups)}
        group_of = torch.tensor([places[id(pair.group)] for pair in pairs], device=self._device)
        self._hyperparameters = hyperparameters, group_of, unit_factors(pairs).to(self._device)

        k = sketch_rows(self._rank)
        self._anchors = torch.zeros(len(self.factors), k, self._rank, device=self._device)
        for anchor, factor in zip(self._anchors, self.factors, strict=True):
            state[factor]["anchor"] = anchor.copy_(state[factor]["anchor"])
        if self.simulates_adam:
            self._norms = torch.zeros(len(self.factors), device=self._device)
            self._steps = torch.zeros(len(self.factors), device=self._device)
            for name, stacked in (("norm", self._norms), ("step", self._steps)):
                for number, factor in zip(stacked, self.factors, strict=True):
                    state[factor][name] = number.copy_(state[factor][name])
        self._sizes = torch.ones(len(self.factors), self._rank, dtype=torch.float64, device=self._device)

    def owns(self, state: dict[Tensor, dict[str, Any]]) -> bool:
        """Whether the optimizer's state still is what the step reads and writes."""
        ends = ((self.factors[0], self._entries[0]), (self.factors[-1], self._entries[-1]))
        return all(state.get(factor) is entry for factor, entry in ends) and all(
            entry.get("momentum") is momentum for entry, momentum in zip(self._entries, self._momenta, strict=True)
        )

    def ready(self) -> bool:
        """Reads the sizes of the columns; whether the factors that have gradients are fit for `solve`."""
        active = torch.tensor([f.grad is not None for f in self.factors], device=self._device)
        n = self._gram_of_factors()
        self._sizes.copy_(n.diagonal(dim1=1, dim2=2).sqrt())
        self._anchor(self._anchors.flatten(1).norm(dim=1) == 0)  # no step yet
        return bool((self._stands(n, _ORTHOGONAL) | ~active).all())

    def _gram_of_factors(self) -> Tensor:
        nothing = torch.zeros(len(self.factors), self._rank, device=self._device)
        self.passes.table[1].copy_(self.passes.table[0])  # no gradients are read
        return self.passes.gram(nothing, nothing[:, 0].contiguous())[:, : self._rank, : self._rank]

    def _stands(self, n: Tensor, orthogonal: float) -> Tensor:
        """Whether factors with these Gram matrices (sides, r, r) are where the last step left them, (sides,)."""
        cosines = n / (self._sizes.unsqueeze(1) * self._sizes.unsqueeze(2))
        cosines.diagonal(dim1=1, dim2=2).sub_(1)
        return (cosines.abs().amax((1, 2)) <= orthogonal) & stands(self._sketch(), self._anchors, MOVED[torch.float32])

    def _sketch(self) -> Tensor:
        """Sketches of the factors' bases."""
        return self.passes.sketch() / self._sizes.unsqueeze(1).float()

    def find_gradients(self) -> None:
        """Fills in the gradients' addresses."""
        gradients = [factor.grad for factor in self.factors]
        present = [g for g in gradients if g is not None]
        self._copies = []
        if not all(g.is_contiguous() and g.dtype == torch.float32 for g in present):
            if any(g.dtype != torch.float32 for g in present):
                raise UserError("gradients of float32 LoRA factors must be float32, too: leave their grad_dtype alone")
            self._copies = gradients = [g if g is None else g.contiguous() for g in gradients]
            present = [g for g in gradients if g is not None]
        if len(present) < len(gradients):  # a pair steps if both its factors have gradients
            both = [b is not None and a is not None for b, a in zip(gradients[::2], gradients[1::2], strict=True)]
            addresses = [g.data_ptr() if both[i // 2] else 0 for i, g in enumerate(gradients)]  # type: ignore[union-attr]
        else:
            addresses = [g.data_ptr() for g in present]
        if addresses != self._addresses:
            self.passes.aligned = self.passes.aligned and not any(address % 16 for address in addresses)
            self.passes.table[1].copy_(pinned(addresses, torch.int64, self._device), non_blocking=True)
            self._addresses = addresses

    def _of_pairs(self, name: str) -> Tensor:
        """A hyperparameter of every pair, (pairs, 1, 1)."""
        return self._numbers[:, list(HYPERPARAMETERS).index(name)].reshape(-1, 1, 1)

    def begin(self) -> None:
        """Reads what the host has filled in."""
        table, group_of, factors = self._hyperparameters
        self._numbers = table[group_of] * factors
        self._active = self.passes.table[1, ::2] != 0

    def _gram(self, gradient_weight: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The Gram matrices (sides, 2r, 2r) of [factor N], and the weights that make N of gradient and momentum."""
        weights = self._column_weights(gradient_weight).flatten(0, 1).float()
        kept = momentum.expand(-1, 2, 1).flatten().float()
        return self.passes.gram(weights, kept), weights, kept

    def _column_weights(self, gradient_weight: Tensor) -> Tensor:
        """Weights (pairs, 2, r) of the gradients' columns."""
        # the basis of the other side is its factor over the sizes of its columns
        others = self._sizes.unflatten(0, (-1, 2)).flip(1)
        return gradient_weight / (self._of_pairs("scaling") * others)

    def _along(self, n: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of Gram matrices of [factor N]: the factor's root, its inverse, its basis' products with N, and N^T N."""
        r = self._rank
        roots, inverses = cholesky(n[:, :r, :r])
        return roots, inverses, inverses.mT @ n[:, :r, r:], n[:, r:, r:]

    def measure_gradient(self) -> Tensor:
        """The squared norm of P_X(G) over all pairs; the norms of its two factors are kept for simulated Adam."""
        one = torch.ones_like(self._of_pairs("lr"))
        n, _, _ = self._gram(one, 0 * one)
        _, _, along, square = self._along(n)
        whole = square.diagonal(dim1=1, dim2=2).sum(-1)
        squares = torch.stack([whole - along.square().sum((1, 2)), whole], 1).unflatten(0, (-1, 2))
        # of M_A only the part outside U counts: sides 0 of the first, sides 1 of the second
        square_a, square_b = squares[:, 0, 0].clamp_min(0), squares[:, 1, 1]
        self._gradient_norms = torch.stack([square_a, square_b], 1).sqrt()  # of the sides, as in the state
        return torch.where(self._active, square_a + square_b, 0).sum()

    def solve(self, scale: Tensor) -> Tensor:
        """Everything but the writing; whether all numbers are finite."""
        r = self._rank
        n, self._weights, self._kept = self._gram(scale * self._of_pairs("gradient_weight"), self._of_pairs("momentum"))
        # pairs that do not step get matrices of full rank, so that nothing takes a slow way for them
        n.diagonal(dim1=1, dim2=2).add_((~self._active).repeat_interleave(2).unsqueeze(1))
        unmoved = self._stands(n[:, :r, :r], _NEARLY_ORTHOGONAL)
        roots, inverses, along, square = self._along(n)
        whole = square.diagonal(dim1=1, dim2=2).sum(-1)
        rest_roots, rest_inverses = cholesky(
            square - along.mT @ along,
            (RANGE_FLOOR[torch.float32] * whole).clamp_min(SMALLEST_SQUARE).contiguous(),
        )
        basis = basis_of(inverses, along, rest_inverses)
        left, right = (Half(*(x[i::2] for x in (roots, along, rest_roots, basis))) for i in (0, 1))
        moved = move(
            left,
            right,
            scaling=self._of_pairs("scaling"),
            direction=self._direction(scale),
            lr=self._of_pairs("lr"),
            weight_decay=self._of_pairs("weight_decay"),
            min_singular_value=self._of_pairs("min_singular_value"),
            triplets=self._triplets,
        )
        self._new_sizes = moved.sizes
        t = self._combinations(moved)
        t[:, :r, :r].diagonal(dim1=1, dim2=2).sub_(1)  # the pass adds to the factors
        self._t = t.float()
        finite = torch.isfinite(whole).unflatten(0, (-1, 2)).all(1)
        self._unmoved = unmoved.unflatten(0, (-1, 2)).all(1) | ~finite  # one thing at a time
        solved = torch.isfinite(self._t).flatten(1).all(1).unflatten(0, (-1, 2)).all(1)
        return ((finite & (solved | ~self._unmoved)) | ~self._active).all()

    def _combinations(self, moved: Moved) -> Tensor:
        """What makes [F' M'] of [F N], (sides, 2r, 2r)."""
        return torch.stack([moved.left, moved.right], 1).flatten(0, 1)

    def _direction(self, scale: Tensor) -> Direction:
        if self._algorithm != "sgd":
            return orthogonal_direction(RANK_TOLERANCE[torch.float32], self._polar_factor)
        if not self.simulates_adam:
            return _itself
        beta = self._of_pairs("beta").reshape(-1, 1).expand(-1, 2).flatten()
        norms = (self._gradient_norms * scale).flatten()
        self._new_norms = torch.lerp(norms, self._norms.double(), beta)
        averages = self._new_norms / (1 - beta ** (self._steps.double() + 1))
        norm_a, norm_b = averages.unflatten(0, (-1, 2)).unbind(1)
        return scaled_direction(norm_a, norm_b, self._of_pairs("eps").flatten())

    def write(self, finite: Tensor) -> Tensor:
        """The second pass and the new state, unless a number is not finite; whether factors were changed unnoticed."""
        steps = self._active & self._unmoved & finite
        self._apply((~steps).int())
        self._record(steps.repeat_interleave(2))
        return (self._active & ~self._unmoved).any()

    def _apply(self, skip: Tensor) -> None:
        self.passes.apply(self._weights, self._kept, self._t, skip)

    def _record(self, of_sides: Tensor) -> None:
        """The new small state of the sides that stepped."""
        sizes = self._new_sizes.repeat_interleave(2, 0)
        self._sizes.copy_(torch.where(of_sides.unsqueeze(1), sizes, self._sizes))
        self._anchor(of_sides)
        if self.simulates_adam:
            self._norms.copy_(torch.where(of_sides, self._new_norms, self._norms))
            self._steps.add_(of_sides)

    def _anchor(self, of_sides: Tensor) -> None:
        self._anchors.copy_(torch.where(of_sides[:, None, None], self._sketch(), self._anchors))


def _itself(core: Tensor) -> Tensor:
    return core


def pinned(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers where a device can fetch them without the host waiting."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
