"""Eigenvalues and eigenvectors of many small symmetric matrices at once, also where a GPU's library does them in turn.

The GPU's batched eigensolver takes matrices up to 32 x 32; larger ones it solves one after another (an NVIDIA H200:
0.4 ms for 224 matrices of 32 x 32, 350 ms for as many of 128 x 128). A block Jacobi method makes the large problem out
of small ones: it diagonalises pairs of blocks of 16 rows and columns, all disjoint pairs of all matrices in one call,
until nothing is left beside the diagonal.
"""

import torch
from torch import Tensor, nn

_BLOCK = 16
_SWEEPS = 30
_CONVERGED = 1e-14
"""What may be left beside the diagonal, in the largest entry and times the size: four times the best float64 can do."""


def eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., k), ascending, and eigenvectors (..., k, k) of symmetric matrices, as `torch.linalg.eigh`.

    Takes the route that is quick on the device of `a`, a batch (L, k, k) of positive semidefinite matrices in float64.
    """
    if a.is_cuda and a.shape[-1] > 2 * _BLOCK:
        return block_jacobi_eigh(a)
    values, vectors = torch.linalg.eigh(a)
    return values, vectors


def block_jacobi_eigh(a: Tensor) -> tuple[Tensor, Tensor]:
    """The same by cyclic block Jacobi, in some six sweeps of products and of eigenproblems of 32 x 32.

    Args:
        a: Positive semidefinite matrices (L, k, k) in float64.
    """
    batch, k, _ = a.shape
    missing = -k % (2 * _BLOCK)
    size = k + missing
    scale = a.abs().amax((-2, -1), keepdim=True)
    a = nn.functional.pad(a / torch.where(scale > 0, scale, 1), (0, missing, 0, missing))
    a.diagonal(dim1=-2, dim2=-1)[:, k:] = -1  # below every true eigenvalue, so the added ones mix with none
    pairs = size // (2 * _BLOCK)
    vectors = torch.eye(size, dtype=a.dtype, device=a.device).expand_as(a)  # as rows

    def rotate(w: Tensor, x: Tensor) -> Tensor:
        return (w.mT @ x.reshape(batch, pairs, 2 * _BLOCK, size)).view_as(a)

    orders = [(order, order.argsort()) for order in _rounds(2 * pairs, a.device)]
    for _ in range(_SWEEPS):
        beside = a - a.diagonal(dim1=-2, dim2=-1).diag_embed()
        if not bool(beside.abs().amax() > _CONVERGED * size):
            break
        for order, back in orders:
            a = a[:, order][:, :, order]
            blocks = a.view(batch, pairs, 2 * _BLOCK, pairs, 2 * _BLOCK).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
            # the larger eigenvalues always go to the earlier block: without one order for all, blocks swap for ever
            w = torch.linalg.eigh(blocks).eigenvectors.flip(-1)
            a = rotate(w, rotate(w, a).mT)[:, back][:, :, back]
            vectors = rotate(w, vectors[:, order])[:, back]
    values, order = a.diagonal(dim1=-2, dim2=-1).sort(-1)
    vectors = vectors.gather(1, order.unsqueeze(-1).expand_as(vectors)).mT
    return values[:, missing:] * scale.squeeze(-1), vectors[:, :k, missing:]


def _rounds(blocks: int, device: torch.device) -> list[Tensor]:
    """A round-robin tournament: orders of the rows in which every block once stands beside every other, in pairs."""
    rows = torch.arange(blocks * _BLOCK, device=device).view(blocks, _BLOCK)
    ring = list(range(1, blocks))
    orders = []
    for _ in range(blocks - 1):
        seats = [0, *ring]
        met = [sorted((seats[i], seats[-1 - i])) for i in range(blocks // 2)]
        orders.append(rows[[block for pair in met for block in pair]].flatten())
        ring = ring[-1:] + ring[:-1]
    return orders
