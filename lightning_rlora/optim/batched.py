"""The step in plain torch, on any device: what is tall is stacked by shape, what is small by rank alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_rlora.geometry import RANK_TOLERANCE
from lightning_rlora.geometry.gram import polar_factor, polar_factor_by_eigh
from lightning_rlora.optim.anchors import MOVED, sketch, stands, turn
from lightning_rlora.optim.groups import HYPERPARAMETERS, PairInGroup, unit_factors
from lightning_rlora.optim.sides import (
    Sides,
    Velocity,
    add_momentum,
    bases,
    combinations,
    combined,
    gradient_products,
    velocity_of,
)
from lightning_rlora.optim.two_pass import Direction, Moved, orthogonal_direction, scaled_direction


class Batch:
    """One step of all pairs of one rank, dtype, device and algorithm, after the first look at their factors.

    Args:
        pairs: The pairs; all have gradients.
        state: The optimizer's state, with `momentum`, `anchor` and, for simulated Adam, `norm` and `step`.
    """

    def __init__(self, pairs: list[PairInGroup], state: dict[Tensor, dict[str, Any]]) -> None:
        shapes: dict[Hashable, list[PairInGroup]] = defaultdict(list)
        for pair in pairs:
            shapes[pair.b.shape, pair.a.shape].append(pair)
        self.pairs = [pair for members in shapes.values() for pair in members]
        # in the order of `Sides`: the left sides of all pairs, then the right sides
        stacks = [[b for _, b, *_ in members] for members in shapes.values()]
        stacks += [[a for a, *_ in members] for members in shapes.values()]
        self._shapes = [(len(stack), *stack[0].shape) for stack in stacks]
        self._factors = [factor for stack in stacks for factor in stack]
        self._states = [state[factor] for factor in self._factors]
        self._sides = Sides(
            self._framed(_tall(stacks)),
            _tall([[factor.grad for factor in stack] for stack in stacks]),  # type: ignore[misc]
            _tall([[state[factor]["momentum"] for factor in stack] for stack in stacks]),
        )
        self._bases = bases(self._sides)
        self._numbers = _numbers(self.pairs, self._bases.root.device)
        self._algorithm = pairs[0].group["algorithm"]
        self._simulates_adam = self._algorithm == "sgd" and pairs[0].group["simulate_adam"]

    def _framed(self, factors: list[Tensor]) -> list[Tensor]:
        """The factors in the frame in which the step is made: as they are."""
        return factors

    def lost(self) -> list[PairInGroup]:
        """Pairs of which a factor is not of full rank."""
        finite = torch.isfinite(self._bases.inverse).all(2).all(1).view(2, -1).all(0).tolist()
        return [pair for pair, found in zip(self.pairs, finite, strict=True) if not found]

    @cached_property
    def _gradient_norms(self) -> tuple[Tensor, Tensor]:
        return self._velocity_of(self._gradient_products(1 / self._numbers["scaling"])).norms()

    def gradient_square(self) -> Tensor:
        """The squared norm of P_X(G) over all pairs."""
        return torch.cat(self._gradient_norms).square().sum()

    def accelerate(self, scale: float) -> bool:
        """Forms the new momentum from the gradient times a scale; whether it is finite. Nothing is written yet."""
        self._scale = scale
        tall = self._gradient_products(scale * self._numbers["gradient_weight"] / self._numbers["scaling"])
        add_momentum(tall, self._sides.momenta, self._numbers["momentum"], self._turns())
        self._velocity = self._velocity_of(tall)
        return bool(torch.isfinite(self._velocity.square()).all())

    def _gradient_products(self, weight: Tensor) -> list[Tensor]:
        return gradient_products(self._sides, self._bases, weight)

    def _velocity_of(self, tall: list[Tensor]) -> Velocity:
        return velocity_of(tall, self._bases)

    def _turns(self) -> Tensor | None:
        """How the bases turned since the last step, if factors were changed from outside."""
        sketched = sketch(*self._sides.factors).double() @ self._bases.inverse
        anchors = torch.stack(self._stored("anchor"))
        tolerance = MOVED[anchors.dtype]
        anchors = anchors.double()
        if bool(stands(sketched, anchors, tolerance).all()):
            return None
        turns = turn(sketched, anchors, tolerance)
        # where one basis is lost, so is the point that the momentum belonged to
        known = turns.abs().amax((1, 2)) > 0
        return turns * (known & known.roll(len(known) // 2))[:, None, None]

    def _moved(self) -> Moved:
        numbers = {name: self._numbers[name] for name in ("scaling", "lr", "weight_decay", "min_singular_value")}
        return combinations(self._bases, self._velocity, direction=self._direction(), **numbers)

    def write(self) -> None:
        """Moves the factors and their state."""
        moved = self._moved()
        factors, momenta = combined(self._sides.factors, self._velocity, moved)
        anchors = sketch(*factors) / torch.cat([moved.sizes, moved.sizes]).unsqueeze(1).to(factors[0].dtype)
        old = [*self._factors, *self._stored("momentum"), *self._stored("anchor")]
        torch._foreach_copy_(old, [*self._like_factors(factors), *self._like_factors(momenta), *anchors.unbind()])

    def _stored(self, name: str) -> list[Tensor]:
        return [one[name] for one in self._states]

    def _like_factors(self, stacks: list[Tensor]) -> Iterator[Tensor]:
        """The single tensors of tall stacks, laid out like the factors."""
        lefts = len(stacks) // 2
        rows = [*stacks[:lefts], *(x.mT for x in stacks[lefts:])]
        for stack, shape in zip(rows, self._shapes, strict=True):
            yield from stack.reshape(shape).unbind()

    def _direction(self) -> Direction:
        """What the algorithm makes of the momentum."""
        if self._algorithm != "sgd":
            dtype = self._factors[0].dtype
            polar = polar_factor_by_eigh if dtype == torch.float32 else polar_factor
            return orthogonal_direction(RANK_TOLERANCE[dtype], polar)
        if not self._simulates_adam:
            return lambda core: core
        norms, steps = self._stored("norm"), self._stored("step")
        device = norms[0].device
        beta = self._numbers["beta"].flatten().repeat(2)
        average = torch.lerp(torch.cat(self._gradient_norms) * self._scale, torch.stack(norms).double(), beta)
        torch._foreach_copy_(norms, average.to(norms[0].dtype).unbind())
        torch._foreach_add_(steps, 1)
        # averages that start at zero are too small by 1 - beta^steps
        norm_a, norm_b = (average / (1 - beta ** torch.stack(steps).to(device))).chunk(2)
        return scaled_direction(norm_a, norm_b, eps=self._numbers["eps"].flatten())


def _tall(stacks: list[list[Tensor]]) -> list[Tensor]:
    """Stacks of tensors laid out like the factors, as tall matrices."""
    stacked = [torch.stack(stack).flatten(2) for stack in stacks]
    lefts = len(stacked) // 2
    return [*stacked[:lefts], *(x.mT for x in stacked[lefts:])]


def _numbers(pairs: list[PairInGroup], device: torch.device) -> dict[str, Tensor]:
    """Hyperparameters of every pair, each (L, 1, 1) in float64."""
    rows = {id(pair.group): [float(number(pair.group)) for number in HYPERPARAMETERS.values()] for pair in pairs}
    places = {group: place for place, group in enumerate(rows)}
    table = torch.tensor(list(rows.values()), dtype=torch.float64)
    table = table[torch.tensor([places[id(pair.group)] for pair in pairs])] * unit_factors(pairs)
    return dict(zip(HYPERPARAMETERS, table.to(device).view(len(pairs), -1, 1, 1).unbind(1), strict=True))
