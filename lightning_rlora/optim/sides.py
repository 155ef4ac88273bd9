"""The tall matrices of the fast step: each is read a few times and written once, and none of float32 is factored.

L adapters of one rank have products X = c B A with factors B (m, r) and A^T (n, r), loss gradients known through the
factor gradients c G A^T and c G^T B, and a momentum M = M_A V^T + U M_B^T with U^T M_A = 0, in the orthonormal bases
U = B R_B^-1 and V = A^T R_A^-1 of the factors' Cholesky roots. Both sides of an adapter are treated alike: with factor
F, gradient D and momentum M_F of one side and the root R' of the other's factor,

    pass 1    the Gram matrix of F, then the new momentum N = D R'^-1 / c + momentum M_F and its products with F and N
    between   everything else (`two_pass`), on matrices of r to 2r columns, in float64, for all adapters at once
    pass 2    [F' M_F'] = [F N] T

The factors are never assumed balanced or orthogonal, since the Gram matrices measure them: the step depends on the
product alone, not on how it is factored, and rounding drift corrects itself. The result is in the balanced gauge.

A Gram matrix in float64 loses what is smaller than 1e-8 of its largest length. Float32 factors do not resolve that
anyway; for float64 ones QRs take its place.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_rlora.geometry.gram import cholesky_root, range_root, root_of_range, triangle
from lightning_rlora.optim.two_pass import (
    RANGE_FLOOR,
    SMALLEST_SQUARE,
    Direction,
    Half,
    Moved,
    basis_of,
    eigh_triplets,
    move,
    svd_triplets,
)


class Sides(NamedTuple):
    """The tall matrices of L adapters of one rank, in stacks of one height each, all in one dtype.

    First the left sides of all adapters, then the right sides in the same order: 2L matrices in all. What is small is
    kept in one tensor (2L, ...) in this order.

    Attributes:
        factors: B of all adapters, then A^T, each stack (l, rows, r).
        gradients: Their gradients.
        momenta: M_A of all adapters, then M_B.
    """

    factors: Sequence[Tensor]
    gradients: Sequence[Tensor]
    momenta: Sequence[Tensor]


class Bases(NamedTuple):
    """The orthonormal bases of the factors, F R^-1.

    Attributes:
        factors: The factors in float64, stacks as in `Sides`.
        root: Upper triangular R with positive diagonal, (2L, r, r) in float64.
        inverse: R^-1.
    """

    factors: list[Tensor]
    root: Tensor
    inverse: Tensor


class Velocity(NamedTuple):
    """A tangent vector, known by tall matrices N of each side: (I - U U^T) N_left V^T + U N_right^T.

    Attributes:
        tall: N, stacks as in `Sides`.
        along: The bases' products with N, (2L, r, r) in float64.
        rest: What N holds outside the basis: its Gram matrix (2L, r, r) or, for float64 factors, a matrix (2L, r, r)
            that has this Gram matrix.
        is_gram: Which of the two `rest` is.
    """

    tall: list[Tensor]
    along: Tensor
    rest: Tensor
    is_gram: bool

    def rest_square(self) -> Tensor:
        """The squared norm of what each N holds outside the basis, (2L,)."""
        if self.is_gram:
            return self.rest.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(0)
        return self.rest.square().sum((1, 2))

    def square(self) -> Tensor:
        """The squared norm of each N, (2L,)."""
        return self.rest_square() + self.along.square().sum((1, 2))

    def norms(self) -> tuple[Tensor, Tensor]:
        """The Frobenius norms of the two tangent factors, (L,): (I - U U^T) N_left and N_right."""
        pairs = len(self.along) // 2
        return self.rest_square()[:pairs].sqrt(), self.square()[pairs:].sqrt()

    def rest_root(self, floor: Tensor) -> tuple[Tensor, Tensor]:
        """R with R^T R the Gram matrix of N's part outside the basis, and R's inverse on its range."""
        return range_root(self.rest, floor) if self.is_gram else root_of_range(self.rest, floor)


def bases(sides: Sides) -> Bases:
    """The bases of the factors; not finite where a factor is not of full rank."""
    factors = [factor.double() for factor in sides.factors]
    if sides.factors[0].dtype == torch.float64:
        found = [triangle(factor, factor.shape[-1])[:2] for factor in factors]
        root, inverse = (torch.cat(part) for part in zip(*found, strict=True))
    else:
        root, inverse = cholesky_root(torch.cat([torch.bmm(factor.mT, factor) for factor in factors]))
    return Bases(factors, root, inverse)


def gradient_products(sides: Sides, at: Bases, weight: Tensor) -> list[Tensor]:
    """G V and G^T U times a weight, stacks as in `Sides`.

    Args:
        sides: The tall matrices.
        at: What `bases` returned for them.
        weight: The weight divided by PEFT's c, (L, 1, 1) in float64.
    """
    # G V = (c G A^T) R_A^-1 / c, and likewise G^T U
    return _products(sides.gradients, torch.cat([weight, weight]) * _swapped(at.inverse))


def add_momentum(tall: list[Tensor], momenta: Sequence[Tensor], momentum: Tensor, turns: Tensor | None = None) -> None:
    """Adds M times `momentum` to what `gradient_products` returned, in place.

    Args:
        tall: Stacks as in `Sides`.
        momenta: M's.
        momentum: Share of the old momentum that is kept, (L, 1, 1) in float64.
        turns: If M is stored in other bases than the present ones: (2L, r, r), U^T U_old and V^T V_old for bases that
            were re-factored from outside. Rotations keep M; zeros forget it.
    """
    kept = torch.cat([momentum, momentum])
    if turns is None:
        shares = kept.to(tall[0].dtype).split([len(stack) for stack in tall])
        for n, m, share in zip(tall, momenta, shares, strict=True):
            n.addcmul_(m, share)
    else:
        _products(momenta, kept * _swapped(turns).mT, tall)  # M_B is a set of coefficients on U, M_A on V


def velocity_of(tall: list[Tensor], at: Bases) -> Velocity:
    """The tangent vector (I - U U^T) N_left V^T + U N_right^T of stacks of N at the point of `bases`."""
    r = at.root.shape[-1]
    if tall[0].dtype == torch.float64:
        found = [triangle(torch.cat([factor, n], -1), r)[2:] for factor, n in zip(at.factors, tall, strict=True)]
        # a stack of fewer than 2r rows leaves fewer than r
        rest = torch.cat([nn.functional.pad(below, (0, 0, 0, r - below.shape[1])) for _, below in found])
        return Velocity(tall, torch.cat([beside for beside, _ in found]), rest, is_gram=False)
    products = []
    for factor, n in zip(at.factors, tall, strict=True):
        n = n.double()
        products.append((torch.bmm(factor.mT, n), torch.bmm(n.mT, n)))
    cross, square = (torch.cat(found) for found in zip(*products, strict=True))
    along = at.inverse.mT @ cross
    return Velocity(tall, along, square - along.mT @ along, is_gram=True)


def combinations(
    at: Bases,
    velocity: Velocity,
    *,
    scaling: Tensor | float,
    direction: Direction,
    lr: Tensor | float,
    weight_decay: Tensor | float,
    min_singular_value: Tensor | float,
) -> Moved:
    """The step from the new momentum M on, X <- retract((1 - lr weight_decay) X - lr D(M)), before anything tall moves.

    The momentum is carried to the new point by projection, as it was before `direction`.

    Args:
        at: What `bases` returned for the factors.
        velocity: The new momentum there.
        scaling: PEFT's c. This and other numbers may differ between adapters, (L, 1, 1).
        direction: From the momentum's core to the step's.
        lr: Length of the step.
        weight_decay: Rate at which X shrinks, times lr.
        min_singular_value: Floor of the new point's singular values.
    """
    dtype = velocity.tall[0].dtype
    root, inverse = velocity.rest_root((RANGE_FLOOR[dtype] * velocity.square()).clamp_min(SMALLEST_SQUARE))
    basis = basis_of(at.inverse, velocity.along, inverse)
    left, right = (
        Half(*parts) for parts in zip(*(x.chunk(2) for x in (at.root, velocity.along, root, basis)), strict=True)
    )
    return move(
        left,
        right,
        scaling=scaling,
        direction=direction,
        lr=lr,
        weight_decay=weight_decay,
        min_singular_value=min_singular_value,
        triplets=svd_triplets if dtype == torch.float64 else eigh_triplets,
    )


def combined(factors: Sequence[Tensor], velocity: Velocity, moved: Moved) -> tuple[list[Tensor], list[Tensor]]:
    """The new factors and the new momenta, stacks as in `Sides`."""
    r = factors[0].shape[-1]
    t = torch.cat([moved.left, moved.right])
    new = _products(velocity.tall, t[:, r:], _products(factors, t[:, :r]))
    return [x[..., :r] for x in new], [x[..., r:] for x in new]


def _swapped(small: Tensor) -> Tensor:
    """What belongs to the other side of each adapter."""
    return small.roll(len(small) // 2, 0)


def _products(stacks: Sequence[Tensor], small: Tensor, onto: list[Tensor] | None = None) -> list[Tensor]:
    """Stacks (l, rows, r) times small matrices (2L, r, k), added in place to `onto` if that is given."""
    shares = small.to(stacks[0].dtype).split([len(stack) for stack in stacks])
    return [
        _product(stack, share, None if onto is None else onto[i])
        for i, (stack, share) in enumerate(zip(stacks, shares, strict=True))
    ]


def _product(stack: Tensor, small: Tensor, onto: Tensor | None) -> Tensor:
    # in the layout of the stack, which for right sides is that of A
    if stack.stride(-1) != 1:
        first, second, onto = small.mT, stack.mT, None if onto is None else onto.mT
    else:
        first, second = stack, small
    found = torch.bmm(first, second) if onto is None else onto.baddbmm_(first, second)
    return found if first is stack else found.mT
