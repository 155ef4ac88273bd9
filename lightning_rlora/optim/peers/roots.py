"""Inverse square roots of small Gram matrices and polar factors of tall ones, for many adapters at once.

The papers approximate both by fixed numbers of matrix products (Newton and Schulz). Here they are exact to rounding, by
eigenvalues of r x r matrices in float64, so that a method does what its formula says whatever the conditioning. All of
them take stacks of several shapes: a call of an eigensolver takes about as long for many matrices as for one, and on a
GPU the host waits for it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_rlora.geometry.batched_eigh import eigh
from lightning_rlora.geometry.gram import gram

SMALLEST = 1e-5
"""Singular values at or below this share of the largest count as zero: their directions are rounding."""

DIVISOR_FLOOR = 1e-30
"""The least that norms are divided by: zero over zero is zero, and whatever is not zero is far above."""


def eighs(stacks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Eigenvalues, ascending, and eigenvectors of stacks of symmetric matrices (L, r, r), all in one call."""
    sizes = [len(stack) for stack in stacks]
    values, vectors = eigh(torch.cat(stacks))
    return list(zip(values.split(sizes), vectors.split(sizes), strict=True))


def inverse_roots(stacks: list[Tensor], ridge: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """(N + d I)^(-1/2) of positive semidefinite N (L, r, r); zero where N and d are zero.

    Args:
        stacks: Of matrices N.
        ridge: From a matrix's eigenvalues, (L, r) -> (L,), to d.
    """
    return [_inverse_root(values + ridge(values).unsqueeze(-1), vectors) for values, vectors in _spectra(stacks)]


def pseudo_inverse_roots(stacks: list[Tensor]) -> list[Tensor]:
    """N^(-1/2) on the range of positive semidefinite N (L, r, r), Gram matrices of factors, and zero beside it."""
    return [
        _inverse_root(values * (values > SMALLEST**2 * values[..., -1:]), vectors)
        for values, vectors in _spectra(stacks)
    ]


def msigns(stacks: list[Tensor]) -> list[Tensor]:
    """The polar factors X (X^T X)^(-1/2) of x (L, k, r), on X's range; zero stays zero."""
    roots = pseudo_inverse_roots([gram(x) for x in stacks])
    return [x @ root for x, root in zip(stacks, roots, strict=True)]


def spectral_norms(stacks: list[Tensor]) -> list[Tensor]:
    """The largest singular value of each matrix, (L, k, r) -> (L,)."""
    return [values[..., -1].sqrt() for values, _ in _spectra([gram(x) for x in stacks])]


def _spectra(stacks: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """`eighs` of semidefinite matrices, without the rounding below zero."""
    return [(values.clamp_min(0), vectors) for values, vectors in eighs(stacks)]


def _inverse_root(values: Tensor, vectors: Tensor) -> Tensor:
    inverse = torch.where(values > 0, values, torch.inf).rsqrt()
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT
