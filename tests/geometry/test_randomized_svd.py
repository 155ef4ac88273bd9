"""The randomised SVD, given nothing but products, against torch.linalg.svd of the matrices."""

import pytest
import torch
from torch import Tensor

from lightning_rlora.geometry import Svd, randomized_svd

SHAPES = [(60, 40), (40, 60), (25, 25), (7, 90), (1, 5), (5, 1)]


class Matrices:
    """Multiplies a list of matrices, and writes down which calls came with which blocks."""

    def __init__(self, matrices: list[Tensor]):
        self.matrices = matrices
        self.calls: list[tuple[str, list[tuple[int, ...]]]] = []

    def multiply(self, blocks: list[Tensor]) -> list[Tensor]:
        self.calls.append(("G", [tuple(block.shape) for block in blocks]))
        return [g @ block for g, block in zip(self.matrices, blocks, strict=True)]

    def multiply_transposed(self, blocks: list[Tensor]) -> list[Tensor]:
        self.calls.append(("G^T", [tuple(block.shape) for block in blocks]))
        return [g.mT @ block for g, block in zip(self.matrices, blocks, strict=True)]

    def svd(self, rank, *, oversampling=4, power_steps=1, seed=0, dtype=torch.float64) -> list[Svd]:
        return randomized_svd(
            self.multiply,
            self.multiply_transposed,
            [tuple(g.shape) for g in self.matrices],
            rank,
            oversampling=oversampling,
            power_steps=power_steps,
            generator=torch.Generator().manual_seed(seed),
            dtype=dtype,
        )


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(m: int, n: int, spectrum: Tensor, seed: int) -> Tensor:
    k = min(m, n, len(spectrum))
    left, right = gaussian(m, k, seed=seed), gaussian(n, k, seed=seed + 1)
    return torch.linalg.qr(left).Q * spectrum[:k] @ torch.linalg.qr(right).Q.mT


def dense(svd: Svd) -> Tensor:
    return svd.u * svd.s @ svd.v.mT


def assert_orthonormal(basis: Tensor, allowed: float) -> None:
    assert (basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max() <= allowed


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-13), (torch.float32, 1e-5)])  # measured 4e-15, 9e-7
@pytest.mark.parametrize("power_steps", [0, 1, 3])
@pytest.mark.parametrize("true_rank", [0, 1, 5])
def test_rank_deficient_matrices_are_found_exactly(true_rank, power_steps, dtype, allowed):
    """Zero matrices among them, and the rank of the shape where that is smaller."""
    matrices = [gaussian(m, true_rank, seed=m) @ gaussian(true_rank, n, seed=n + 100) for m, n in SHAPES]
    scaled = [(g * 10.0 ** (3 - 2 * i)).to(dtype) for i, g in enumerate(matrices)]
    for g, svd in zip(scaled, Matrices(scaled).svd(5, power_steps=power_steps, dtype=dtype), strict=True):
        k = min(5 + 4, *g.shape)
        assert [tuple(x.shape) for x in svd] == [(g.shape[0], k), (k,), (g.shape[1], k)]
        assert all(x.dtype is dtype for x in svd)
        assert_orthonormal(svd.u, allowed)
        assert_orthonormal(svd.v, allowed)
        assert (dense(svd) - g).norm() <= allowed * g.norm()
        assert (svd.s - torch.linalg.svdvals(g)[:k]).abs().max() <= allowed * g.norm()


@pytest.mark.parametrize(
    "name, spectrum",
    [
        ("1 / i", 1 / torch.arange(1, 201, dtype=torch.float64)),
        ("i^-0.75", torch.arange(1, 201, dtype=torch.float64) ** -0.75),
        ("0.9^i", 0.9 ** torch.arange(200, dtype=torch.float64)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_power_step_captures_the_energy_of_decaying_spectra(name, spectrum):
    rank, shapes = 16, [(300, 200), (200, 300), (200, 200)]
    matrices = [with_spectrum(m, n, spectrum, seed) for seed, (m, n) in enumerate(shapes)]
    best = spectrum[:rank].square().sum()
    for g, svd in zip(matrices, Matrices(matrices).svd(rank, oversampling=16), strict=True):
        captured = (svd.u[:, :rank].mT @ g).square().sum() / best
        assert 0.99 <= captured <= 1 + 1e-12  # measured 0.99977, 0.9979 and 0.9999994
        # A compression of G has no larger singular values than G.
        assert (svd.s <= spectrum[: len(svd.s)] * (1 + 1e-12)).all()
        # What is returned is the SVD of Q Q^T G, so its own energy is what it captures.
        torch.testing.assert_close(svd.s[:rank].square().sum(), captured * best, rtol=1e-10, atol=0)


def test_power_steps_improve_a_slow_spectrum():
    spectrum = torch.arange(1, 201, dtype=torch.float64).rsqrt()
    g = with_spectrum(300, 200, spectrum, seed=0)
    lost = []
    for power_steps in (0, 1, 4):
        (svd,) = Matrices([g]).svd(8, oversampling=2, power_steps=power_steps)
        lost.append(1 - (svd.s[:8].square().sum() / spectrum[:8].square().sum()).item())
    assert lost[0] > 3 * lost[1] > 9 * lost[2] > 0  # measured 0.36, 0.040, 0.0019


def test_reorthonormalisation_keeps_small_singular_values():
    """Without it six passes raise the ratio of 1e-6 between the singular values to 1e-36, and one vector is left."""
    spectrum = torch.tensor([1, 1e-2, 1e-4, 1e-6], dtype=torch.float64)
    g = with_spectrum(30, 20, spectrum, seed=0)
    (svd,) = Matrices([g]).svd(4, oversampling=0, power_steps=3)
    torch.testing.assert_close(svd.s, spectrum, rtol=1e-8, atol=0)  # measured 4e-12


@pytest.mark.parametrize("power_steps", [0, 1, 2, 15])
def test_one_call_serves_all_matrices(power_steps):
    matrices = Matrices([gaussian(m, n, seed=m) for m, n in SHAPES])
    matrices.svd([1, 2, 30, 4, 5, 6], oversampling=3, power_steps=power_steps)
    widths = [4, 5, 25, 7, 1, 1]  # min(rank + oversampling, m, n)
    right = ("G", [(n, k) for (_, n), k in zip(SHAPES, widths, strict=True)])
    left = ("G^T", [(m, k) for (m, _), k in zip(SHAPES, widths, strict=True)])
    assert matrices.calls == [right, left] * (power_steps + 1)


def test_blocks_handed_out_are_orthonormal():
    g = gaussian(30, 20)
    seen: list[Tensor] = []

    def multiply(blocks: list[Tensor]) -> list[Tensor]:
        seen.extend(blocks)
        return [g @ blocks[0]]

    def multiply_transposed(blocks: list[Tensor]) -> list[Tensor]:
        seen.extend(blocks)
        return [g.mT @ blocks[0]]

    generator = torch.Generator().manual_seed(0)
    randomized_svd(
        multiply,
        multiply_transposed,
        [(30, 20)],
        4,
        oversampling=2,
        power_steps=2,
        generator=generator,
        dtype=torch.float64,
    )
    for block in seen[1:]:  # the first is the Gaussian sketch
        assert_orthonormal(block, 1e-13)


def test_only_the_generator_matters():
    matrices = Matrices([gaussian(m, n, seed=m) for m, n in SHAPES])
    state = torch.get_rng_state()
    first, again, other = (matrices.svd(3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, y) for one, two in zip(first, again, strict=True) for x, y in zip(one, two, strict=True))
    assert not torch.equal(first[0].s, other[0].s)


def test_products_of_another_dtype_are_cast():
    """Under autocast the products come in bfloat16, which no QR takes. Its 8 bits bound the accuracy."""
    g = with_spectrum(40, 30, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), seed=0).to(torch.bfloat16)

    class Rounded(Matrices):
        def multiply(self, blocks):
            return super().multiply([block.to(torch.bfloat16) for block in blocks])

        def multiply_transposed(self, blocks):
            return super().multiply_transposed([block.to(torch.bfloat16) for block in blocks])

    (svd,) = Rounded([g]).svd(3, dtype=torch.float32)
    assert svd.s.dtype is torch.float32
    torch.testing.assert_close(svd.s[:3], torch.tensor([3.0, 2.0, 1.0]), rtol=1e-2, atol=0)  # measured 1.6e-3


def test_a_rank_for_every_matrix_is_needed():
    with pytest.raises(ValueError, match="zip"):
        Matrices([gaussian(5, 4), gaussian(4, 5)]).svd([2])
