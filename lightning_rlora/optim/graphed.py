"""The step on a GPU: all pairs of a rank at once, in place, in one CUDA graph that never waits for the host.

The same mathematics as `two_pass`, with the tall matrices read where they are. It holds between steps in which nothing
was changed from outside: factors then have orthogonal columns of known sizes, so the new momentum N is a weighting of
columns of gradient and old momentum, formed on the fly in both passes, and the Gram matrix of [B N] is all that the
small algebra needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rlora.geometry import RANK_TOLERANCE
from lightning_rlora.optim import products, small_matrices
from lightning_rlora.optim.anchors import MOVED, sketch_rows, stands
from lightning_rlora.optim.small_kernels import cholesky
from lightning_rlora.optim.tall_kernels import TallPasses
from lightning_rlora.optim.two_pass import (
    RANGE_FLOOR,
    Core,
    Direction,
    Half,
    move,
    orthogonal_direction,
    scaled_direction,
)

HYPERPARAMETERS = ("lr", "momentum", "weight_decay", "scaling", "min_singular_value")
_ORTHOGONAL = 1e-5
"""Cosine of two columns of a factor from which on they no longer count as orthogonal; rounding makes 1e-7."""


class PairOfGroup(NamedTuple):
    """A pair of factors, and the place of its group among the optimizer's."""

    a: Tensor
    b: Tensor
    group: int


class GraphedStep:
    """Steps of an optimizer's pairs.

    Args:
        pairs: All pairs, float32, contiguous, on one CUDA device, with their state.
        groups: The optimizer's parameter groups.
        state: The optimizer's state; its anchors and running norms become views of stacked ones.
        max_tangent_norm: Of the optimizer.

    Attributes:
        found_nonfinite: float32 scalar on the device: 1 after a step that was left out for a gradient that is not
            finite.
        gradient_scale: float32 scalar on the device: factor on the gradients of the last step (clipping).
        other_square: float64 scalar on the device, for the caller to set: the squared norm of all other gradients,
            which are clipped together with the pairs'.
        max_tangent_norm: As given; the graph holds it.
    """

    def __init__(
        self,
        pairs: Iterable[PairOfGroup],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        max_tangent_norm: float | None,
    ) -> None:
        self._groups = groups
        buckets: dict[tuple[Any, ...], list[PairOfGroup]] = {}
        for pair in pairs:
            group = groups[pair.group]
            key = (len(pair.a), group["algorithm"], group["simulate_adam"], group["eps"])
            buckets.setdefault(key, []).append(pair)
        self._device = next(iter(buckets.values()))[0].a.device
        # numbers of the groups are kept on the device, so that a schedule changes them without a new graph
        self._numbers: list[list[float]] = []
        self._hyperparameters = torch.zeros(
            len(groups), len(HYPERPARAMETERS) + 2, dtype=torch.float64, device=self._device
        )
        self._buckets = [_Bucket(bucket, groups, state, self._hyperparameters) for bucket in buckets.values()]
        self.max_tangent_norm = max_tangent_norm
        self.other_square = torch.zeros((), dtype=torch.float64, device=self._device)
        self.gradient_scale = torch.ones((), device=self._device)
        self.found_nonfinite = torch.zeros((), device=self._device)
        # sticky reports to the host, read a step late
        self._reports = torch.zeros(2, device=self._device)
        self._seen = torch.zeros(2, pin_memory=self._device.type == "cuda")
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False
        self._aligned: list[bool] = []
        self._versions = self._version_of_factors()

    @property
    def found(self) -> tuple[bool, bool]:
        """Whether an earlier step met a gradient that is not finite, and whether one met factors changed unnoticed."""
        nonfinite, changed = self._seen.tolist()
        return bool(nonfinite), bool(changed)

    def ready(self) -> bool:
        """Whether every factor has orthogonal columns and stands where the last step left it; waits for the device."""
        return all(bucket.ready() for bucket in self._buckets)

    def unchanged(self) -> bool:
        """Whether all factors are where they were and, as far as autograd knows, none was written to since."""
        return self._versions == self._version_of_factors()

    def _version_of_factors(self) -> list[int]:
        factors = [factor for bucket in self._buckets for factor in bucket.factors]
        return [factor._version for factor in factors] + [factor.data_ptr() for factor in factors]

    def step(self) -> bool:
        """One step of all pairs that have gradients; false, with nothing done, if a gradient is not contiguous."""
        if not all(bucket.find_gradients() for bucket in self._buckets):
            return False
        aligned = [bucket.passes.aligned for bucket in self._buckets]
        if aligned != self._aligned:
            self._graph, self._warm, self._aligned = None, False, aligned
        numbers = [
            [float(group[name]) for name in HYPERPARAMETERS]
            + [group["betas"][1], 1.0 if group["algorithm"] == "riemannion" else 1.0 - group["momentum"]]
            for group in self._groups
        ]
        if numbers != self._numbers:
            self._hyperparameters.copy_(_pinned(numbers, torch.float64, self._device), non_blocking=True)
            self._numbers = numbers
        if self._device.type != "cuda" or not self._warm:
            self._launch()  # compiles the kernels
            self._warm = True
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                    self._launch()
            self._graph.replay()
        self._seen.copy_(self._reports, non_blocking=True)
        return True

    def _launch(self) -> None:
        scale = torch.ones((), dtype=torch.float64, device=self._device)
        squares = [self.other_square]
        for bucket in self._buckets:
            bucket.begin()
            if self.max_tangent_norm is not None or bucket.simulates_adam:
                squares.append(bucket.measure_gradient())
        if self.max_tangent_norm is not None:
            scale = (torch.stack(squares).sum().rsqrt() * self.max_tangent_norm).clamp_max(1.0)
        finite = torch.isfinite(self.other_square)
        for bucket in self._buckets:
            finite = finite & bucket.solve(scale)
        changed = torch.zeros_like(finite)
        for bucket in self._buckets:
            changed = changed | bucket.write(finite)
        self.gradient_scale.copy_(scale)
        self.found_nonfinite.copy_(~finite)
        self._reports.copy_(torch.maximum(self._reports, torch.stack([~finite, changed]).float()))


class _Bucket:
    """The pairs of one rank and algorithm: their tables, their small state, and the parts of a step."""

    def __init__(
        self,
        pairs: list[PairOfGroup],
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        hyperparameters: Tensor,
    ) -> None:
        first = groups[pairs[0].group]
        self._algorithm, self._eps = first["algorithm"], first["eps"]
        self.simulates_adam = first["algorithm"] == "sgd" and first["simulate_adam"]
        self._rank, device = len(pairs[0].a), pairs[0].a.device
        self.factors = [factor for pair in pairs for factor in (pair.b, pair.a)]  # sides: B, A, B, A, ...
        # rotations need no more than registers for small matrices; products are quicker from some size on
        self._polar_factor = (small_matrices if self._rank <= 8 else products).polar_factor
        self._triplets = (small_matrices if self._rank <= 32 else products).leading_triplets
        heights = [factor.numel() // self._rank for factor in self.factors]
        momenta = [state[factor]["momentum"] for factor in self.factors]
        addresses = [[x.data_ptr() for x in tall] for tall in (self.factors, momenta)]
        aligned = all(x % 16 == 0 for x in (*heights, *addresses[0], *addresses[1]))
        self.passes = TallPasses(heights, self._rank, device, aligned=aligned)
        self.passes.table[0].copy_(torch.tensor(addresses[0]))
        self.passes.table[2].copy_(torch.tensor(addresses[1]))
        self._addresses: list[int] = []
        group_of = torch.tensor([pair.group for pair in pairs], device=device)
        self._hyperparameters = hyperparameters, group_of

        k = sketch_rows(self._rank)
        self._anchors = torch.zeros(len(self.factors), k, self._rank, device=device)
        for anchor, factor in zip(self._anchors, self.factors, strict=True):
            state[factor]["anchor"] = anchor.copy_(state[factor]["anchor"])
        if self.simulates_adam:
            self._norms = torch.zeros(len(self.factors), device=device)
            self._steps = torch.zeros(len(self.factors), device=device)
            for name, stacked in (("norm", self._norms), ("step", self._steps)):
                for number, factor in zip(stacked, self.factors, strict=True):
                    state[factor][name] = number.copy_(state[factor][name])
        self._sizes = torch.ones(len(self.factors), self._rank, dtype=torch.float64, device=device)

    def ready(self) -> bool:
        """Reads the sizes of the columns; whether the factors are fit for `solve`."""
        nothing = torch.zeros(len(self.factors), self._rank, device=self._sizes.device)
        self.passes.table[1].copy_(self.passes.table[0])  # no gradients are read
        n = self.passes.gram(nothing, nothing[:, 0].contiguous())[:, : self._rank, : self._rank]
        self._sizes.copy_(n.diagonal(dim1=1, dim2=2).sqrt())
        cosines = n / self._sizes.unsqueeze(1) / self._sizes.unsqueeze(2)
        cosines.diagonal(dim1=1, dim2=2).zero_()
        if not bool((cosines.abs() <= _ORTHOGONAL).all()):
            return False
        fresh = self._anchors.flatten(1).norm(dim=1) == 0  # no step yet
        sketched = self.passes.sketch() / self._sizes.unsqueeze(1).float()
        self._anchors.copy_(torch.where(fresh[:, None, None], sketched, self._anchors))
        return bool(self._stands(1 / self._sizes).all())

    def _stands(self, inverse_sizes: Tensor) -> Tensor:
        sketched = self.passes.sketch() * inverse_sizes.unsqueeze(1).float()
        return stands(sketched, self._anchors, MOVED[torch.float32])

    def find_gradients(self) -> bool:
        """Fills in the gradients' addresses; false if one is not laid out like its factor."""
        gradients = [factor.grad for factor in self.factors]
        present = [g for g in gradients if g is not None]
        if not all(g.is_contiguous() for g in present):
            return False
        if len(present) < len(gradients):  # a pair steps if both its factors have gradients
            both = [b is not None and a is not None for b, a in zip(gradients[::2], gradients[1::2], strict=True)]
            addresses = [g.data_ptr() if both[i // 2] else 0 for i, g in enumerate(gradients)]  # type: ignore[union-attr]
        else:
            addresses = [g.data_ptr() for g in present]
        if addresses != self._addresses:
            self.passes.aligned = self.passes.aligned and not any(address % 16 for address in addresses)
            self.passes.table[1].copy_(_pinned(addresses, torch.int64, self._sizes.device), non_blocking=True)
            self._addresses = addresses
        return True

    def _of_pairs(self, name: str) -> Tensor:
        """A hyperparameter of every pair, (pairs, 1, 1)."""
        place = (*HYPERPARAMETERS, "beta", "gradient_weight").index(name)
        return self._numbers[:, place].reshape(-1, 1, 1)

    def begin(self) -> None:
        """Reads what the host has filled in."""
        table, group_of = self._hyperparameters
        self._numbers = table[group_of]
        self._active = self.passes.table[1, ::2] != 0

    def _gram(self, gradient_weight: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The Gram matrices (sides, 2r, 2r) of [factor N], and the weights that make N of gradient and momentum."""
        # the basis of the other side is its factor over the sizes of its columns
        others = self._sizes.unflatten(0, (-1, 2)).flip(1)
        weights = (gradient_weight / (self._of_pairs("scaling") * others)).flatten(0, 1).float()
        kept = momentum.expand(-1, 2, 1).flatten().float()
        return self.passes.gram(weights, kept), weights, kept

    def measure_gradient(self) -> Tensor:
        """The squared norm of P_X(G) over all pairs; the norms of its two factors are kept for simulated Adam."""
        one = torch.ones_like(self._of_pairs("lr"))
        n, _, _ = self._gram(one, 0 * one)
        r = self._rank
        _, inverse = cholesky(n[:, :r, :r])
        along = inverse.mT @ n[:, :r, r:]
        whole = n[:, r:, r:].diagonal(dim1=1, dim2=2).sum(-1)
        squares = torch.stack([whole - along.square().sum((1, 2)), whole], 1).unflatten(0, (-1, 2))
        # of M_A only the part outside U counts: sides 0 of the first, sides 1 of the second
        square_a, square_b = squares[:, 0, 0].clamp_min(0), squares[:, 1, 1]
        self._gradient_norms = torch.stack([square_a, square_b], 1).sqrt()  # of the sides, as in the state
        return torch.where(self._active, square_a + square_b, 0).sum()

    def solve(self, scale: Tensor) -> Tensor:
        """Everything but the writing; whether all numbers are finite."""
        r = self._rank
        n, self._weights, self._kept = self._gram(scale * self._of_pairs("gradient_weight"), self._of_pairs("momentum"))
        roots, inverses = cholesky(n[:, :r, :r])
        along = inverses.mT @ n[:, :r, r:]
        whole = n[:, r:, r:].diagonal(dim1=1, dim2=2).sum(-1)
        rest_roots, rest_inverses = cholesky(
            n[:, r:, r:] - along.mT @ along, (RANGE_FLOOR[torch.float32] * whole).contiguous()
        )
        zero = torch.zeros_like(along)
        beside = -inverses @ along @ rest_inverses
        basis = torch.cat([torch.cat([inverses, beside], 2), torch.cat([zero, rest_inverses], 2)], 1)
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
        t = torch.stack([moved.left, moved.right], 1).flatten(0, 1)
        t[:, :r, :r].diagonal(dim1=1, dim2=2).sub_(1)  # the pass adds to the factors
        self._t = t.float()
        self._unmoved = self._stands(1 / roots.diagonal(dim1=1, dim2=2)).unflatten(0, (-1, 2)).all(1)
        finite = torch.isfinite(whole).unflatten(0, (-1, 2)).all(1)
        return (finite | ~self._active).all()

    def _direction(self, scale: Tensor) -> Direction:
        if self._algorithm == "riemannion":
            return orthogonal_direction(RANK_TOLERANCE[torch.float32], self._polar_factor)
        if not self.simulates_adam:
            return _itself
        beta = self._of_pairs("beta").reshape(-1, 1).expand(-1, 2).flatten()
        norms = (self._gradient_norms * scale).flatten()
        self._new_norms = torch.lerp(norms, self._norms.double(), beta)
        averages = self._new_norms / (1 - beta ** (self._steps.double() + 1))
        norm_a, norm_b = averages.unflatten(0, (-1, 2)).unbind(1)
        return scaled_direction(norm_a, norm_b, self._eps)

    def write(self, finite: Tensor) -> Tensor:
        """The second pass and the new state, unless a number is not finite; whether factors were changed unnoticed."""
        steps = self._active & self._unmoved & finite
        self.passes.apply(self._weights, self._kept, self._t, (~steps).int())
        of_sides = steps.repeat_interleave(2)
        sizes = self._new_sizes.repeat_interleave(2, 0)
        self._sizes.copy_(torch.where(of_sides.unsqueeze(1), sizes, self._sizes))
        anchors = self.passes.sketch() / self._sizes.unsqueeze(1).float()
        self._anchors.copy_(torch.where(of_sides[:, None, None], anchors, self._anchors))
        if self.simulates_adam:
            self._norms.copy_(torch.where(of_sides, self._new_norms, self._norms))
            self._steps.add_(of_sides)
        return (self._active & ~self._unmoved).any()


def _itself(core: Core) -> Core:
    return core


def _pinned(numbers: list[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
