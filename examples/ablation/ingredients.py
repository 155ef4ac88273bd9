"""What may be in an optimizer of this kind: each ingredient alone on, or taken from, the baseline."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from whitened_step import TOLERANCE, AdamW, Layer, Method, Sides, State, WhitenedStep


class Ingredient(NamedTuple):
    """A row of the table: its name, the idea and its source, the method, and how many budgets of steps it gets."""

    name: str
    idea: str
    method: Method
    budgets: int = 1


class Whole(NamedTuple):
    """A frame by a whole matrix and its inverse, (P, rows, rows)."""

    matrix: Tensor
    inverse: Tensor

    def into(self, tall: Tensor) -> Tensor:
        return self.matrix @ tall

    def out_of(self, tall: Tensor) -> Tensor:
        return self.inverse @ tall


@dataclass(frozen=True)
class WholeMatrices(WhitenedStep):
    every: int = 5

    def square(self, tall: Tensor) -> Tensor:
        return tall @ tall.mT

    def frames(self, state: State) -> list[Any]:
        if state["steps"] % self.every == 1 or "frames" not in state:
            found = (torch.linalg.eigh(curvature) for curvature in state["curvatures"])
            state["frames"] = [self.frame(self.roots(values.clamp_min(0)).unsqueeze(1), v) for values, v in found]
        return state["frames"]

    def frame(self, roots: Tensor, vectors: Tensor) -> Whole:
        return Whole((vectors * roots) @ vectors.mT, (vectors / roots) @ vectors.mT)


class Nesterov(WhitenedStep):
    def target(self, gradient: Tensor, velocities: dict[str, Tensor], progress: float) -> Tensor:
        return gradient + self.momentum * velocities["momentum"]


@dataclass(frozen=True)
class MomentumRamp(WhitenedStep):
    last: float = 0.95

    def velocities(self, gradient: Tensor, carried: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        share = self.momentum + (self.last - self.momentum) * progress
        return {"momentum": gradient + share * carried.get("momentum", 0)}


@dataclass(frozen=True)
class SlowMomentum(WhitenedStep):
    slow_decay: float = 0.95
    slow_share: float = 0.5

    def velocities(self, gradient: Tensor, carried: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        slow = self.slow_decay * carried.get("slow", 0) + (1 - self.slow_decay) * gradient
        return super().velocities(gradient, carried, progress) | {"slow": slow}

    def target(self, gradient: Tensor, velocities: dict[str, Tensor], progress: float) -> Tensor:
        return (1 - self.momentum) * velocities["momentum"] + self.slow_share * velocities["slow"]


class Cautious(WhitenedStep):
    def orthogonal(self, core: Tensor, gradient: Tensor) -> Tensor:
        u, s, vt = torch.linalg.svd(core)
        agrees = ((u.mT @ gradient) * vt).sum(-1) > 0
        louder = (core.shape[-1] / agrees.sum(-1, keepdim=True).clamp_min(1)).clamp_max(2)
        return (u * (agrees * louder * (s > TOLERANCE * s[:, :1])).unsqueeze(1)) @ vt


@dataclass(frozen=True)
class PartlyOrthogonal(WhitenedStep):
    power: float = 0.2

    def orthogonal(self, core: Tensor, gradient: Tensor) -> Tensor:
        """Of the polar factor's norm where all singular values count."""
        u, s, vt = torch.linalg.svd(core)
        s = (s / s[:, :1].clamp_min(1e-300)) ** self.power * (s > TOLERANCE * s[:, :1])
        s = s * core.shape[-1] ** 0.5 / s.norm(dim=1, keepdim=True).clamp_min(1e-300)
        return (u * s.unsqueeze(1)) @ vt


class OutsideKept(WhitenedStep):
    def tangent_part(self, core: Tensor) -> Tensor:
        return core


class Orthographic(WhitenedStep):
    def bent(self, moved: Tensor, length: Tensor) -> Tensor:
        r = moved.shape[-1] // 2
        point, right, below = moved[:, :r, :r], moved[:, :r, r:], moved[:, r:, :r]
        damped = point @ point.mT + length.square() * torch.eye(r, dtype=moved.dtype, device=moved.device)
        moved[:, r:, r:] += below @ point.mT @ torch.linalg.solve(damped, right)
        return moved


@dataclass(frozen=True)
class Clipped(WhitenedStep):
    limit: float = 1.5

    def clipped(self, gradient: Tensor, state: State) -> Tensor:
        norm = gradient.norm(dim=(1, 2), keepdim=True)
        state["norm"] = torch.lerp(norm, state.get("norm", norm), 0.9)
        return gradient * (self.limit * state["norm"] / norm.clamp_min(1e-300)).clamp_max(1)


@dataclass(frozen=True)
class LocallyOptimalStart(WhitenedStep):
    alpha: float = -0.05
    start_batches = 4

    def start(self, layer: Layer, rank: int, generator: torch.Generator, gradient: Tensor | None) -> Sides:
        """alpha U_{1..r} V_{r+1..2r}^T of the gradient's singular triplets; the base is shifted back by it."""
        u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
        size = abs(self.alpha) ** 0.5
        return [math.copysign(size, self.alpha) * u[:, :rank], size * vt[rank : 2 * rank].mT]


def absolute(layer: Layer) -> float:
    return 1.0


def size_only(layer: Layer) -> float:
    return layer.rms


def shape_only(layer: Layer) -> float:
    return math.sqrt(max(layer.m, layer.n))


def where(pattern: str, pace: float) -> Callable[[Layer], float]:
    """A pace for the layers whose names hold a pattern, 1 for the others."""
    return lambda layer: pace if re.search(pattern, layer.name) else 1.0


def later_faster(layer: Layer) -> float:
    return 2 ** (2 * layer.depth - 1)


def each(name: str, idea: str, method: Callable[[float], Method], *values: float) -> list[Ingredient]:
    """One ingredient at several values."""
    return [Ingredient(name.format(value), idea, method(value)) for value in values]


def adamw(second: float, power: float = 1.0) -> list[Ingredient]:
    name, idea = f"AdamW, betas (0.9, {second})", "the reference (arXiv 1711.05101), from LoRA's start"
    if power != 1:
        name += f", decay to the power {power}"
    method = AdamW(betas=(0.9, second), decay_power=power)
    return [Ingredient(name, idea, method), Ingredient(f"{name}, twice the steps", idea, method, budgets=2)]


BASELINE = Ingredient("baseline", "whitened Riemannion with rates relative to the base's weights", WhitenedStep())
EXPONENT = "of the mean squares; Shampoo's is 0.25 (arXiv 1802.09568)"
BETWEEN = "between the momentum and its polar factor"
WARMUP = "share of the run over which the rate rises"
CLIPPING = "gradients larger than usual count less"
CURVATURE = "how long, and above what floor, curvatures remember"
START = "a locally optimal start of this size (RiemannLoRA, arXiv 2507.12142) from 4 batches, base shifted"
MOMENTUM = "share of the momentum kept"
KINDS = "kinds of layers may want paces of their own"
POWER = "the schedule's decay to a power"
FEW_STEPS = "momentum 0.7 to 0.9, decay to the power 0.75, whitening exponent 0.35, together"

INGREDIENTS = [
    BASELINE,
    Ingredient("absolute rate", "one spectral norm of the step for every layer", WhitenedStep(unit=absolute)),
    Ingredient("relative to size only", "entries' root mean square, not the shape", WhitenedStep(unit=size_only)),
    Ingredient("relative to shape only", "root of the larger side, not the size", WhitenedStep(unit=shape_only)),
    Ingredient("no whitening", "the paper's Riemannion (arXiv 2507.12142)", WhitenedStep(exponent=0.0)),
    *each("whitening exponent {}", EXPONENT, lambda x: WhitenedStep(exponent=x), 0.125, 0.375, 0.5),
    Ingredient("whole-matrix whitening", "Shampoo's matrices in place of their diagonals", WholeMatrices()),
    *each("curvature decay {}", CURVATURE, lambda x: WhitenedStep(curvature_decay=x), 0.9, 0.99),
    *each("curvature floor {}", CURVATURE, lambda x: WhitenedStep(floor=x), 0.1, 1e-6),
    Ingredient("Nesterov", "one more step of momentum ahead, as in Muon", Nesterov()),
    *each("momentum {}", MOMENTUM, lambda x: WhitenedStep(momentum=x), 0.6, 0.7, 0.9),
    Ingredient("momentum 0.6 to 0.95", "short memory first, long memory last", MomentumRamp(momentum=0.6)),
    Ingredient("momentum 0.7 to 0.9", "short memory first, long memory last", MomentumRamp(momentum=0.7, last=0.9)),
    Ingredient("few steps", FEW_STEPS, MomentumRamp(momentum=0.7, last=0.9, decay_power=0.75, exponent=0.35)),
    Ingredient("slow second momentum", "a second, longer average beside (AdEMAMix, arXiv 2409.03137)", SlowMomentum()),
    Ingredient("cautious", "drops directions that the last gradient opposes (Cautious, arXiv 2411.16085)", Cautious()),
    *each("singular values to the power {}", BETWEEN, lambda x: PartlyOrthogonal(power=x), 0.1, 0.2, 0.5),
    Ingredient("block outside both spaces kept", "orthogonalised without the tangent projection after", OutsideKept()),
    Ingredient("orthographic retraction", "the outer block filled to rank r (Absil and Malick, 2012)", Orthographic()),
    *each("warm-up {}", WARMUP, lambda x: WhitenedStep(warmup=x), 0.0, 0.02, 0.1, 0.2),
    *each("decay to the power {}", POWER, lambda x: WhitenedStep(decay_power=x), 0.75, 1.4),
    Ingredient("weight decay 0.04", "X shrinks by the rate times this", WhitenedStep(weight_decay=0.04)),
    *each("clipped at {} of the running norm", CLIPPING, lambda x: Clipped(limit=x), 1.0, 1.5, 2.5),
    *each("locally optimal start, alpha {}", START, lambda x: LocallyOptimalStart(alpha=x), -0.01, -0.05, -0.25),
    Ingredient("later layers faster", "half the pace first to twice the pace last", WhitenedStep(pace=later_faster)),
    Ingredient("attention's v, o at half pace", KINDS, WhitenedStep(pace=where("[vo]_proj", 0.5))),
    Ingredient("attention's q, k at half pace", KINDS, WhitenedStep(pace=where("[qk]_proj", 0.5))),
    Ingredient("MLP at twice the pace", KINDS, WhitenedStep(pace=where("mlp", 2.0))),
    *(row for second in (0.95, 0.99, 0.999) for row in adamw(second)),
    *adamw(0.95, power=0.75),
]
