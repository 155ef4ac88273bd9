"""The small algebra of the fast step against QRs and SVDs of the tall matrices themselves."""

import pytest
import torch

from lightning_rlora.geometry.gram import (
    cholesky_root,
    gram,
    polar_factor,
    polar_factor_by_eigh,
    range_root,
    root_of_range,
    triangle,
)

DOUBLE = torch.float64


def tall(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def test_gram_of_float32_is_exact_to_float64():
    w = tall(3, 500, 6, dtype=torch.float32)
    w[:, :, 1] = w[:, :, 0] * (1 + 2**-16)  # nearly parallel: float32 sums would lose the difference
    n = gram(w)
    difference = n[:, 0, 0] - 2 * n[:, 0, 1] + n[:, 1, 1]
    exact = (w[:, :, 0].double() - w[:, :, 1].double()).square().sum(1)
    assert n.dtype == DOUBLE
    assert ((difference - exact).abs() / exact).max() < 1e-4  # measured 1e-5
    coarse = (w.mT @ w).double()
    assert (coarse[:, 0, 0] - 2 * coarse[:, 0, 1] + coarse[:, 1, 1] - exact).abs().min() > 10 * exact.max()


@pytest.mark.parametrize("spread", [1.0, 1e-8, 1e-14])
def test_cholesky_root_is_the_r_of_a_qr(spread):
    w = tall(4, 50, 6) * spread ** (torch.arange(6, dtype=DOUBLE) / 5)
    root, inverse = cholesky_root(gram(w))
    expected = torch.linalg.qr(w).R
    expected = expected * expected.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)
    scale = gram(w).diagonal(dim1=-2, dim2=-1).sqrt().unsqueeze(-2)
    assert ((root - expected) / scale).abs().max() < 1e-13  # measured 7e-16, whatever the spread
    assert torch.equal(root.tril(-1), torch.zeros_like(root))
    u = w @ inverse
    assert error(u.mT @ u, torch.eye(6, dtype=DOUBLE)) < 1e-13  # measured 9e-16


@pytest.mark.parametrize("rank", [0, 1, 3, 5])
@pytest.mark.parametrize("from_matrix", [False, True], ids=["gram", "matrix"])
def test_range_root_keeps_the_range_and_nothing_else(rank, from_matrix):
    w = tall(4, 30, rank) @ tall(4, rank, 5, seed=1)
    floor = 1e-12 * w.square().sum((1, 2))
    root, inverse = root_of_range(w, floor) if from_matrix else range_root(w.mT @ w, floor)
    assert root.shape == inverse.shape == (4, 5, 5)
    assert (root.mT @ root - w.mT @ w).abs().max() < 1e-12  # measured 4e-14
    q = w @ inverse
    norms = q.norm(dim=1)
    assert ((norms - 1).abs().minimum(norms) < 1e-12).all()  # columns of length 1 or 0, measured 2e-14
    assert (norms > 0.5).sum(1).tolist() == [rank] * 4
    gram_q = q.mT @ q
    assert (gram_q - torch.diag_embed(gram_q.diagonal(dim1=1, dim2=2))).abs().max() < 1e-10  # measured 4e-14
    assert (q @ root - w).abs().max() < 1e-11  # the same matrix in that basis, measured 4e-14


def test_range_root_from_the_matrix_resolves_what_the_gram_matrix_loses():
    w = torch.linalg.qr(tall(1, 30, 3)).Q * torch.tensor([1.0, 1e-5, 1e-11], dtype=DOUBLE)
    w = w @ torch.linalg.qr(tall(1, 3, 3, seed=2)).Q
    q = w @ root_of_range(w, torch.full((1,), 1e-28, dtype=DOUBLE))[1]
    assert (q.mT @ q - torch.eye(3, dtype=DOUBLE)).abs().max() < 1e-3  # measured 2e-6: 1e-16 / 1e-11
    lost = w @ range_root(w.mT @ w, torch.full((1,), 1e-28, dtype=DOUBLE))[1]
    assert (lost.mT @ lost - torch.eye(3, dtype=DOUBLE)).abs().max() > 1e-1


def test_root_of_range_of_fewer_rows_than_columns():
    w = tall(2, 2, 5)
    root, inverse = root_of_range(w, torch.zeros(2, dtype=DOUBLE))
    assert root.shape == inverse.shape == (2, 5, 5)
    assert error(root.mT @ root, w.mT @ w) < 1e-13
    assert error((w @ inverse @ root), w) < 1e-13
    empty = root_of_range(w[:, :0], torch.zeros(2, dtype=DOUBLE))
    assert not empty[0].any() and not empty[1].any()


@pytest.mark.parametrize("rows", [4, 7, 40])  # as many rows as the first block has columns, fewer than all, more
def test_triangle_is_the_projection_on_the_first_block(rows):
    w = tall(3, rows, 4)
    z = torch.cat([tall(3, rows, 4, seed=1), w @ tall(3, 4, 4, seed=2)], 2)  # a part inside w's range, too
    root, inverse, along, below = triangle(torch.cat([w, z], 2), 4)
    assert (root.diagonal(dim1=1, dim2=2) > 0).all()
    assert error(root.mT @ root, w.mT @ w) < 1e-13
    u = w @ inverse
    assert error(u.mT @ u, torch.eye(4, dtype=DOUBLE)) < 1e-11  # measured 1e-14
    assert (along - u.mT @ z).abs().max() < 1e-11 * z.abs().max()
    outside = z - u @ (u.mT @ z)
    assert (below.mT @ below - outside.mT @ outside).abs().max() < 1e-11 * z.square().sum()


def test_polar_factor():
    k = tall(5, 6, 6)
    u, _, vt = torch.linalg.svd(k)
    assert error(polar_factor(k, 1e-12), u @ vt) < 1e-12
    # Higham's Newton iteration knows nothing of an SVD
    y = k.clone()
    for _ in range(60):
        y = (y + torch.linalg.inv(y).mT) / 2
    assert error(polar_factor(k, 1e-12), y) < 1e-11  # measured 2e-14
    assert not polar_factor(torch.zeros(1, 4, 4, dtype=DOUBLE), 1e-12).any()
    low = tall(1, 6, 2) @ tall(1, 2, 6, seed=3)
    s = torch.linalg.svdvals(polar_factor(low, 1e-10))
    assert (s - torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=DOUBLE)).abs().max() < 1e-12
    diagonal = torch.diag(torch.tensor([1.0, 2e-5, 5e-6], dtype=DOUBLE))
    assert polar_factor(diagonal, 1e-5).diagonal().abs().tolist() == pytest.approx([1, 1, 0])


@pytest.mark.parametrize("smallest", [1.0, 1e-2, 1.1e-5])
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_polar_factor_by_eigh(smallest, size):
    """The same to float32's rounding, with the same singular values left out."""
    u, v = (torch.linalg.qr(tall(5, 12, 12, seed=seed)).Q for seed in (0, 1))
    s = smallest ** (torch.arange(12, dtype=DOUBLE) / 11)
    s = torch.stack([s, s, s, s, torch.zeros_like(s)])
    s[1, 9:] = 0  # rank deficient
    s[2, 10:] = 0.9e-5  # below the tolerance
    s[3, 0] = 2.0
    k = size * (u * s.unsqueeze(1)) @ v.mT
    expected = polar_factor(k, 1e-5)
    found = polar_factor_by_eigh(k, 1e-5)
    if smallest == 1.1e-5:  # relative to the largest, 2, the last of the fourth lies below
        assert torch.linalg.matrix_rank(expected, rtol=0.5).tolist() == [12, 9, 10, 11, 0]
    assert (found - expected).abs().max() < 1e-6  # measured 5e-8 next to the tolerance, 1e-13 far from it
