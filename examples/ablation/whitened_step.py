"""One step of P adapters of one shape at once: whitened Riemannion, a method for each of its parts, and AdamW.

Both sides are treated alike, so pairs of tall matrices go about: the factors B (P, m, r) and A^T (P, n, r), or the
products G A^T and G^T B of the loss gradient with them. All linear algebra is in float64;
`lightning_rlora.optim.whitening` derives the mathematics and names the letters. A tangent vector a V^T + U b^T of the
frame, U^T a = 0, is one tensor [a; b] (P, m + n, r), so that momenta are sums and norms are norms.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rlora.adapters.gauge import START
from lightning_rlora.geometry import RANK_TOLERANCE
from lightning_rlora.geometry.gram import cholesky_root, gram, polar_factor, range_root
from lightning_rlora.optim.two_pass import RANGE_FLOOR, SMALLEST_SQUARE, svd_triplets

SMALLEST_SINGULAR_VALUE = 1e-14
TOLERANCE = RANK_TOLERANCE[torch.float32]
Sides = list[Tensor]
State = dict[str, Any]


class Layer(NamedTuple):
    """An adapted layer: the name and shape of its weight, the root mean square of its entries, its place in [0, 1]."""

    name: str
    m: int
    n: int
    rms: float
    depth: float


@dataclass(frozen=True)
class Method:
    """What all methods share: a schedule that rises over a share of the run and falls to zero."""

    warmup: float = 0.05
    decay_power: float = 1.0
    start_batches = 0  # whose gradient with respect to the base weights `start` is given

    def multiplier(self, step: int, steps: int) -> float:
        """Of the rate, as by the package's LinearWithWarmup where the power is 1."""
        rise = self.warmup * steps
        if step < rise:
            return (step + 1) / (rise + 1)
        return (1 - min(1.0, (step - rise) / max(1.0, steps - rise))) ** self.decay_power


class Diagonal(NamedTuple):
    """A frame C^(1/2) that scales rows: weights (P, rows, 1)."""

    weights: Tensor

    def into(self, tall: Tensor) -> Tensor:
        return self.weights * tall

    def out_of(self, tall: Tensor) -> Tensor:
        return tall / self.weights


class Point:
    """A point in the frame: its factors, their orthonormal bases U and V, and the way there and back."""

    def __init__(self, factors: Sides, frames: list[Any]) -> None:
        self.frames = frames
        framed = [frame.into(factor) for frame, factor in zip(frames, factors, strict=True)]
        (left_root, left_inverse), (right_root, right_inverse) = (cholesky_root(gram(factor)) for factor in framed)
        self.inverses = [left_inverse, right_inverse]
        self.u, self.v = (factor @ inverse for factor, inverse in zip(framed, self.inverses, strict=True))
        self.core = left_root @ right_root.mT  # U^T X~ V

    def seen(self, products: Sides) -> Sides:
        """G V and G^T U with the other side whitened, of which the curvatures are made."""
        return [product @ inverse for product, inverse in zip(products, self.inverses[::-1], strict=True)]

    def tangent(self, products: Sides) -> Tensor:
        """The projection of a matrix like the gradient, known by its products with the factors."""
        left, right = (frame.out_of(x) for frame, x in zip(self.frames, self.seen(products), strict=True))
        return torch.cat([left - self.u @ (self.u.mT @ left), right], 1)

    def parts(self, tangent: Tensor) -> Sides:
        return list(tangent.split([self.u.shape[1], self.v.shape[1]], 1))

    def products(self, tangent: Tensor, factors: Sides) -> Sides:
        """The products of a tangent vector's matrix with factors of the frame, out of the frame."""
        (a, b), (left, right) = self.parts(tangent), factors
        of_a = a @ (self.v.mT @ right) + self.u @ (b.mT @ right)
        of_b = self.v @ (a.mT @ left) + b @ (self.u.mT @ left)
        return [frame.into(x) for frame, x in zip(self.frames, (of_a, of_b), strict=True)]


class Bases:
    """[U Qa] and [V Qb]: where a tangent vector at a point lies, and the point moved along it."""

    def __init__(self, at: Point, tangent: Tensor) -> None:
        self.at = at
        a, b = at.parts(tangent)
        floor = (RANGE_FLOOR[torch.float32] * tangent.square().sum((1, 2))).clamp_min(SMALLEST_SQUARE)
        outside = [a, b - at.v @ (at.v.mT @ b)]
        self.qa, self.qb = (rest @ range_root(gram(rest), floor)[1] for rest in outside)
        self.both = [torch.cat([at.u, self.qa], 2), torch.cat([at.v, self.qb], 2)]

    def core(self, tangent: Tensor) -> Tensor:
        """Coordinates (P, 2r, 2r) of a tangent vector, which are all of it for the one the bases were made of."""
        a, b = self.at.parts(tangent)
        top = torch.cat([b.mT @ self.at.v, b.mT @ self.qb], 2)
        return torch.cat([top, torch.cat([self.qa.mT @ a, torch.zeros_like(self.at.core)], 2)], 1)


def relative(layer: Layer) -> float:
    """The root mean square singular value of a base weight, as `lightning_rlora.adapters.base_size` measures it."""
    return layer.rms * math.sqrt(max(layer.m, layer.n))


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


@dataclass(frozen=True)
class WhitenedStep(Method):
    """The baseline: the package's WhitenedRiemannion with relative=True."""

    momentum: float = 0.8
    exponent: float = 0.25  # of the mean squares, whose square roots are the curvatures
    curvature_decay: float = 0.98
    floor: float = 1e-3
    weight_decay: float = 0.0
    unit: Callable[[Layer], float] = relative
    pace: Callable[[Layer], float] = lambda layer: 1.0

    def units(self, layers: list[Layer], rank: int) -> list[float]:
        """The spectral norms of steps at rate 1; other units than `relative` are given its geometric mean."""
        same = geometric_mean([relative(layer) for layer in layers]) / geometric_mean([self.unit(x) for x in layers])
        fitting = [min(2 * rank, layer.m, layer.n) for layer in layers]  # singular values of one in a step
        return [self.pace(x) * self.unit(x) * same / count**0.5 for x, count in zip(layers, fitting, strict=True)]

    def start(self, layer: Layer, rank: int, generator: torch.Generator, gradient: Tensor | None) -> Sides:
        """A random point too small to change the function."""
        normal = [torch.randn(rows, rank, generator=generator, dtype=torch.float64) for rows in (layer.m, layer.n)]
        return [torch.linalg.qr(x).Q * START**0.5 for x in normal]

    def step(
        self, factors: Sides, gradients: Sides, state: State, rate: Tensor, unit: Tensor, progress: float
    ) -> Sides:
        """The new factors; rates and units are (P, 1, 1), progress is the share of the run that is over."""
        factors, gradients = [x.double() for x in factors], [x.double() for x in gradients]
        if not state:
            state.update(steps=0, carried={}, curvatures=[torch.zeros_like(self.square(x)) for x in factors])
        at = Point(factors, self.frames(state))
        gradient = self.clipped(at.tangent(gradients), state)
        carried = {name: at.tangent(products) for name, products in state["carried"].items()}
        velocities = self.velocities(gradient, carried, progress)
        target = self.target(gradient, velocities, progress)
        bases = Bases(at, target)
        r = at.core.shape[-1]
        moved = -rate * unit * self.tangent_part(self.orthogonal(bases.core(target), bases.core(gradient)))
        moved[:, :r, :r] += (1 - rate * self.weight_decay) * at.core
        p, sigma, q = svd_triplets(self.bent(moved, rate * unit), r)
        sizes = sigma.clamp_min(SMALLEST_SINGULAR_VALUE).sqrt().unsqueeze(1)
        new = [basis @ turn * sizes for basis, turn in zip(bases.both, (p, q), strict=True)]
        state["carried"] = {name: at.products(velocity, new) for name, velocity in velocities.items()}
        state["curvatures"] = [
            torch.lerp(self.square(x), old, self.curvature_decay)
            for x, old in zip(at.seen(gradients), state["curvatures"], strict=True)
        ]
        state["steps"] += 1
        return [frame.out_of(factor) for frame, factor in zip(at.frames, new, strict=True)]

    def frames(self, state: State) -> list[Any]:
        return [Diagonal(self.roots(curvature).unsqueeze(-1)) for curvature in state["curvatures"]]

    def roots(self, squares: Tensor) -> Tensor:
        """The mean squares (P, rows) to the exponent, scaled to mean 1."""
        mean = squares.mean(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
        found = (squares / mean + self.floor) ** self.exponent
        return found / found.mean(-1, keepdim=True)

    def square(self, tall: Tensor) -> Tensor:
        """What the curvatures are means of."""
        return tall.square().sum(-1)

    def clipped(self, gradient: Tensor, state: State) -> Tensor:
        return gradient

    def velocities(self, gradient: Tensor, carried: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """What is carried from step to step."""
        return {"momentum": gradient + self.momentum * carried.get("momentum", 0)}

    def target(self, gradient: Tensor, velocities: dict[str, Tensor], progress: float) -> Tensor:
        """What is orthogonalised."""
        return velocities["momentum"]

    def orthogonal(self, core: Tensor, gradient: Tensor) -> Tensor:
        """Ortho_r of the target's core, given the gradient's in the same bases."""
        return polar_factor(core, TOLERANCE)

    def tangent_part(self, core: Tensor) -> Tensor:
        """Without the block outside both spaces, which is the projection onto the tangent space."""
        r = core.shape[-1] // 2
        core[:, r:, r:] = 0
        return core

    def bent(self, moved: Tensor, length: Tensor) -> Tensor:
        """The moved point's core, before its best approximation of rank r is taken."""
        return moved


@dataclass(frozen=True)
class AdamW(Method):
    """torch.optim.AdamW without weight decay on the factors, from LoRA's start; its rates have no unit."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def units(self, layers: list[Layer], rank: int) -> list[float]:
        return [1.0] * len(layers)

    def start(self, layer: Layer, rank: int, generator: torch.Generator, gradient: Tensor | None) -> Sides:
        uniform = torch.rand(layer.n, rank, generator=generator, dtype=torch.float64)
        return [torch.zeros(layer.m, rank), (2 * uniform - 1) / math.sqrt(layer.n)]

    def step(
        self, factors: Sides, gradients: Sides, state: State, rate: Tensor, unit: Tensor, progress: float
    ) -> Sides:
        if not state:
            state.update(steps=0, moments=[(torch.zeros_like(x), torch.zeros_like(x)) for x in factors])
        state["steps"] += 1
        first, second = (1 - beta ** state["steps"] for beta in self.betas)
        new = []
        for factor, gradient, (mean, square) in zip(factors, gradients, state["moments"], strict=True):
            mean.lerp_(gradient, 1 - self.betas[0])
            square.lerp_(gradient.square(), 1 - self.betas[1])
            new.append(factor - rate * unit * (mean / first) / ((square / second).sqrt() + self.eps))
        return new
