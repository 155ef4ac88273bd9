"""Polar factors and leading triplets by products, against LAPACK's SVD in float64."""

import pytest
import torch

from lightning_rlora.geometry import gram

pytest.importorskip("triton", reason="the fast step is written in Triton")

from lightning_rlora.optim.cuda import products

TOLERANCE = 1e-5
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def orthogonal(generator, *shape):
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64)).Q


def with_values(values, seed=0):
    """Matrices (L, n, n) with given singular values (L, n)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*values.shape, values.shape[-1])
    return orthogonal(generator, *shape) * values.unsqueeze(1) @ orthogonal(generator, *shape)


def needed(monkeypatch, name):
    """Which matrices the exact route was called for."""
    seen, route = [], getattr(products, name)

    def spy(which, *rest):
        seen.append(which.cpu())
        return route(which, *rest)

    monkeypatch.setattr(products, name, spy)
    return seen


def test_the_quintics_take_the_whole_interval_to_one_and_what_is_far_below_to_zero():
    coefficients = products.polar_coefficients(5e-6)
    assert len(coefficients) == 12
    x = torch.cat([torch.logspace(-5.3, 0, 100_000, dtype=torch.float64), torch.tensor([3e-7, 1e-8, 0.0])])
    for a, b, c in coefficients:
        x = a * x + b * x**3 + c * x**5
    assert (x[:-3] - 1).abs().max() < 1e-12
    assert x[-3:].abs().max() < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [66, 96])
def test_polar_factor(n, device, monkeypatch):
    i = torch.arange(n, dtype=torch.float64)
    values = torch.stack(
        [
            1 + torch.cos(i),
            10 ** (-4.5 * i / n),
            torch.ones(n),
            torch.where(i < 5, 3e7, 0.0),
            torch.where(i < n // 2, 1e-25, 1e-33),  # half of them rounding
            torch.zeros(n),
            10 ** (-9 * i / n + 0.04),  # passes the tolerance
        ]
    ).clamp_min(0)
    values[0, values[0] < 1e-3] = 1e-3
    k = with_values(values)
    wanted = gram.polar_factor(k, TOLERANCE)
    seen = needed(monkeypatch, "_polar_where")
    error = (products.polar_factor(k.to(device), TOLERANCE).cpu() - wanted).norm(dim=(1, 2))
    print(f"\n{n}: {', '.join(f'{x:.1e}' for x in error.tolist())}")
    assert seen[0].tolist() == [False] * 6 + [True]
    assert error.max() < 1e-9  # measured 3e-12, and 1.3e-10 by the rotations of a GPU


def cores(n, seed=0):
    """X - h D in the bases of the point, with singular values s, steps h from small to large, and the sizes h / s."""
    generator, r = torch.Generator().manual_seed(seed), n // 2
    even, spread = torch.ones(r, dtype=torch.float64), torch.logspace(0, -3, r, dtype=torch.float64)
    severe = torch.logspace(0, -8, r, dtype=torch.float64)
    cases = [(s, h) for s in (even, spread) for h in (1e-5, 1e-2, 1.0, 1e3)] + [(severe, 1e-4), (0 * even, 1.0)]
    d = orthogonal(generator, len(cases), n, n)
    d[:, r:, r:] = 0
    c = torch.stack(
        [-h * s[-1].clamp_min(1e-300) * x if h < 1e3 else -h * x for (s, h), x in zip(cases, d, strict=True)]
    )
    c[-1] = -d[-1]
    c[:, :r, :r] += torch.stack([s for s, _ in cases]).diag_embed()
    return c


def assert_leading(p, sigma, q, c, r, allowed, found_on):
    u, s, vt = torch.linalg.svd(c)
    one = torch.eye(r, dtype=torch.float64)
    best = u[..., :r] * s[:, None, :r] @ vt[:, :r]
    error = ((p * sigma.unsqueeze(1)) @ q.mT - best).norm(dim=(1, 2)) / s[:, 0]
    print(f"\n{c.shape[-1]}: product {error.max():.1e}, sigma {((sigma - s[:, :r]) / s[:, :r]).abs().max():.1e}")
    assert (sigma.diff(dim=1) <= 0).all()
    print(f"orthogonal to {(p.mT @ p - one).abs().max():.1e}, {(q.mT @ q - one).abs().max():.1e}")
    assert error.max() < allowed
    # measured 2e-9, and 7e-6 by the rotations of a GPU, which let close singular values be; 7e-14
    beside = p.mT @ p - one
    assert beside.abs().max() < products._COSINE and (q.mT @ q - one).abs().max() < 1e-12
    # of columns that are not quite orthogonal the sizes differ from singular values by half of that (Ostrowski)
    tied = 0.5 * torch.linalg.matrix_norm(beside, 2)[:, None] if found_on == "cuda" else 0.0
    assert ((sigma - s[:, :r]).abs() <= (1e-11 + tied) * s[:, :r] + 3e-14 * s[:, :1]).all()  # measured 4e-13 and 4e-15


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [66, 96])
def test_leading_triplets(n, device, monkeypatch):
    c, r = cores(n), n // 2
    seen = needed(monkeypatch, "_triplets_where")
    found = products.leading_triplets(c.to(device), r)
    assert not seen[0].any()
    assert_leading(*(x.cpu() for x in found), c, r, 1e-10, device)  # measured 4e-11


@pytest.mark.parametrize("device", DEVICES)
def test_spectra_that_products_cannot_part_go_the_exact_way(device, monkeypatch):
    n, r = 66, 33
    i = torch.arange(n, dtype=torch.float64)
    values = torch.stack(
        [
            1 / (1 + i),
            torch.where(i < 20, 1.0, 0.5),  # tied, but not at r
            torch.where(i < r, 1.0, 0.9999),  # tied twice, with a gap at r
            torch.where(i < r, 1.0, 0.0),
            10 ** (-9 * i / n),  # the square is below rounding at r
            torch.where(i < 40, 1.0, 0.1),  # tied at r: any choice is as good
            torch.zeros(n),
        ]
    )
    values[1, r:] = 0.3
    c = with_values(values)
    seen = needed(monkeypatch, "_triplets_where")
    p, sigma, q = (x.cpu() for x in products.leading_triplets(c.to(device), r))
    assert seen[0].tolist()[:4] == [False] * 4 and seen[0].tolist()[5:] == [True] * 2
    assert_leading(p[:5], sigma[:5], q[:5], c[:5], r, 3e-10, device)  # measured 8e-11
    rest = (c[5] - (p[5] * sigma[5]) @ q[5].mT).square().sum()
    assert abs(rest - values[5, r:].square().sum()) < 1e-10
    assert sigma[6].max() < 1e-19


def test_a_matrix_does_not_depend_on_its_neighbours():
    c = cores(40)
    together = products.leading_triplets(c, 20)[1]
    assert all(
        torch.allclose(together[i], products.leading_triplets(c[i : i + 1], 20)[1][0], rtol=1e-12) for i in (0, 3)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("n", [66, 128, 256])
def test_without_waiting_for_the_host(n):
    """In a CUDA graph, and the same bits every time."""
    c, r = cores(n).cuda(), n // 2
    k = with_values(torch.logspace(0, -4, n, dtype=torch.float64).expand(3, n)).cuda()

    def both():
        return products.polar_factor(k, TOLERANCE), *products.leading_triplets(c, r)

    eager = both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(eager, replayed, strict=True))
