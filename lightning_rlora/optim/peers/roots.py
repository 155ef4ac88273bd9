"""Inverse square roots of small Gram matrices and polar factors of tall ones, for many adapters at once.

The papers approximate both by fixed numbers of matrix products (Newton and Schulz). Here they are exact to rounding, by
eigenvalues of r x r matrices in float64, so that a method does what its formula says whatever the conditioning.
"""

import torch
from torch import Tensor

from lightning_rlora.geometry.batched_eigh import eigh
from lightning_rlora.geometry.gram import gram

SMALLEST = 1e-5
"""Singular values at or below this share of the largest count as zero: their directions are rounding."""

DIVISOR_FLOOR = 1e-30
"""The least that norms are divided by: zero over zero is zero, and whatever is not zero is far above."""


def inverse_root(n: Tensor, ridge: Tensor) -> Tensor:
    """(N + ridge I)^(-1/2) of positive semidefinite N (L, r, r), ridge (L,); zero where N and the ridge are zero."""
    values, vectors = eigh(n)
    values = values.clamp_min(0) + ridge.unsqueeze(-1)
    inverse = torch.where(values > 0, values, torch.inf).rsqrt()
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def pseudo_inverse_root(n: Tensor) -> Tensor:
    """N^(-1/2) on the range of positive semidefinite N (L, r, r), the Gram matrix of a factor, and zero beside it."""
    values, vectors = eigh(n)
    kept = values > SMALLEST**2 * values[..., -1:]
    inverse = torch.where(kept, values, torch.inf).rsqrt()
    return (vectors * inverse.unsqueeze(-2)) @ vectors.mT


def msign(x: Tensor) -> Tensor:
    """The polar factor X (X^T X)^(-1/2) of x (L, k, r), on X's range; zero stays zero."""
    return x @ pseudo_inverse_root(gram(x))


def spectral_norm(x: Tensor) -> Tensor:
    """The largest singular value of each matrix, (L, k, r) -> (L,)."""
    return eigh(gram(x))[0][..., -1].clamp_min(0).sqrt()
