"""The block Jacobi method against LAPACK."""

import pytest
import torch

from lightning_rlora.geometry.batched_eigh import block_jacobi_eigh, eigh


def spectra(k):
    i = torch.arange(1, k + 1, dtype=torch.float64)
    angles = torch.cos(3 * i[: k // 2] / k)
    noise = torch.randn(k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        "1 / i": 1 / i,
        "0.8^i": 0.8**i,
        "five ones": (i <= 5).double(),
        "a cluster": 1 + 1e-3 * noise,
        "two joined bases": torch.cat([1 + angles, 1 - angles, torch.ones(k % 2)]),
        "all equal": torch.ones(k),
        "nothing": torch.zeros(k),
        "tiny": 1e-40 / i,
        "nearly equal": 1 + 1e-12 * i,
    }


@pytest.mark.parametrize("k", [33, 48, 96, 100])
def test_agrees_with_lapack(k):
    q = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    spectrum = torch.stack(list(spectra(k).values())).double()
    a = q * spectrum.unsqueeze(-2) @ q.mT
    a = (a + a.mT) / 2
    size = spectrum.amax(-1).clamp_min(1e-300)
    values, vectors = block_jacobi_eigh(a)
    assert values.shape == (len(a), k) and vectors.shape == a.shape
    error = (values - torch.linalg.eigvalsh(a)).abs().amax(-1) / size
    residual = (a @ vectors - vectors * values.unsqueeze(-2)).abs().amax((-2, -1)) / size
    orthogonality = (vectors.mT @ vectors - torch.eye(k)).abs().amax()
    print(f"\n{k}: values {error.max():.1e}, residual {residual.max():.1e}, orthogonality {orthogonality:.1e}")
    assert error.max() < 1e-12  # measured at most 2e-14
    assert residual.max() < 1e-11
    assert orthogonality < 1e-12  # measured at most 2e-14


def test_one_matrix_does_not_depend_on_the_others():
    """Only on how many sweeps they need, whose last ones change nothing but rounding."""
    w = torch.randn(5, 60, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a = w.mT @ w
    together, alone = block_jacobi_eigh(a)[0], torch.cat([block_jacobi_eigh(x[None])[0] for x in a])
    assert (together - alone).abs().max() < 1e-12 * a.abs().max()


def test_on_the_cpu_it_is_lapack():
    a = torch.eye(40, dtype=torch.float64).expand(2, 40, 40)
    assert all(torch.equal(x, y) for x, y in zip(eigh(a), torch.linalg.eigh(a), strict=True))


@pytest.mark.gpu
def test_on_a_gpu():
    w = torch.randn(50, 300, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cuda()
    a = w.mT @ w
    values, vectors = eigh(a)
    assert (a @ vectors - vectors * values.unsqueeze(-2)).abs().max() < 1e-11 * values.max()
    assert (values - torch.linalg.eigvalsh(a)).abs().max() < 1e-12 * values.max()
