"""The randomised SVD, given nothing but products, against torch.linalg.svd of the matrices."""

import sys

import pytest
import torch
from torch import Tensor

from lightning_rlora.geometry import Svd, randomized_svd
from lightning_rlora.geometry.batched_eigh import block_jacobi_eigh
from lightning_rlora.geometry.randomized_svd import generator_on, orthonormal_basis

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


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def many() -> dict[str, Tensor]:
    """Matrices that share a shape and nothing else, and some of other shapes, in float64."""
    decaying = 1 / torch.arange(1, 61, dtype=torch.float64)
    return {
        "decaying": with_spectrum(90, 60, decaying, 0),
        "of rank 5": gaussian(90, 5, seed=1) @ gaussian(5, 60, seed=2),
        "zero": torch.zeros(90, 60, dtype=torch.float64),
        "tiny": 1e-20 * with_spectrum(90, 60, decaying, 3),
        "huge": 1e15 * with_spectrum(90, 60, decaying, 4),
        "over six orders": with_spectrum(90, 60, 10.0 ** -torch.arange(0, 6.1, 0.1, dtype=torch.float64), 5),
        "one row": torch.eye(90, 60, dtype=torch.float64)[:, :1] @ gaussian(1, 60, seed=6),
        "wide": with_spectrum(60, 90, decaying, 7),
        "narrow": gaussian(90, 7, seed=8),
        "narrow, of rank 2": gaussian(90, 2, seed=9) @ gaussian(2, 7, seed=10),
        "square": gaussian(12, 12, seed=11),
        "square, zero": torch.zeros(12, 12, dtype=torch.float64),
    }


@pytest.mark.parametrize("power_steps", [0, 1, 3])
def test_stacks_of_float32_against_dense_svds_in_float64(power_steps):
    """Every matrix gets the triplets of its own compression Q Q^T G, whatever stands beside it in the stack."""
    matrices = many()
    found = Matrices([g.float() for g in matrices.values()]).svd(
        8, oversampling=8, power_steps=power_steps, dtype=torch.float32
    )
    worst = dict.fromkeys(("orthonormal", "triplets", "beyond the rank", "energy lost"), 0.0)

    def note(what: str, error: Tensor) -> None:
        worst[what] = max(worst[what], float(error))

    for (name, g), svd in zip(matrices.items(), found, strict=True):
        k = min(16, *g.shape)
        assert [tuple(x.shape) for x in svd] == [(g.shape[0], k), (k,), (g.shape[1], k)], name
        u, s, v = (x.double() for x in svd)
        assert (s.diff() <= 0).all() and (s >= 0).all()
        exact = torch.linalg.svdvals(g)
        size = exact[0].clamp_min(1e-300)
        note("orthonormal", (u.mT @ u - torch.eye(k)).abs().max())
        note("orthonormal", (v.mT @ v - torch.eye(k)).abs().max())
        note("triplets", (g.mT @ u - v * s).abs().max() / size)
        note("beyond the rank", s[(exact[:k] < 1e-10 * size).nonzero().flatten()].sum() / size)
        note("energy lost", (exact[:8].square().sum() - s[:8].square().sum()) / size**2)
    print(f"\n{power_steps} power steps: " + ", ".join(f"{what} {error:.1e}" for what, error in worst.items()))
    assert worst["orthonormal"] < 1e-6  # measured 5e-8
    assert worst["triplets"] < 2e-6  # measured 4e-7
    assert worst["beyond the rank"] < 1e-6  # measured 0
    assert worst["energy lost"] < {0: 0.2, 1: 2e-3, 3: 1e-5}[power_steps]  # measured 0.066, 6e-4, 1.3e-6


def test_a_stack_is_the_same_as_one_after_another(monkeypatch):
    """Not to the last bit: the random directions are others, and so is the order of sums."""
    matrices = [g.float() for g in many().values()]
    together = Matrices(matrices).svd(4, power_steps=2, dtype=torch.float32)
    monkeypatch.setattr("lightning_rlora.geometry.stacks._CHUNK", 1)
    apart = Matrices(matrices).svd(4, power_steps=2, dtype=torch.float32)
    for one, other in zip(together, apart, strict=True):
        assert (one.s - other.s).abs().max() <= 2e-6 * one.s.max()


def test_with_the_eigensolver_of_a_gpu(monkeypatch):
    """On the CPU, for 2 (24 + 16) columns, more than the library's batched solver takes."""
    matrices = [g.float() for g in many().values()]
    expected = Matrices(matrices).svd(24, oversampling=16, dtype=torch.float32)
    monkeypatch.setattr(sys.modules[randomized_svd.__module__], "eigh", block_jacobi_eigh)
    for one, other in zip(expected, Matrices(matrices).svd(24, oversampling=16, dtype=torch.float32), strict=True):
        assert_orthonormal(other.u, 1e-6)
        assert_orthonormal(other.v, 1e-6)
        assert (one.s - other.s).abs().max() <= 1e-6 * one.s.max()  # measured 2e-7


@pytest.mark.parametrize("dtype, allowed", [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_orthonormal_basis(dtype, allowed):
    """Of independent, graded, dependent and missing columns; the span of the first j is that of the first j."""
    full = gaussian(40, 6)
    graded = full * 10.0 ** -torch.arange(0, 12, 2, dtype=torch.float64)
    dependent = torch.cat([full[:, :2], full[:, :2] @ gaussian(2, 4, seed=1)], 1)
    nearly = full[:, :1] + 1e-4 * full
    missing = full * torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    blocks = torch.stack([full, graded, dependent, nearly, missing, torch.zeros_like(full), 1e-20 * full]).to(dtype)
    for block, q in zip(blocks.double(), orthonormal_basis(blocks, seeded()).double(), strict=True):
        assert q.shape == block.shape
        assert_orthonormal(q, allowed)  # measured 1e-15, 2e-7
        for j in range(1, 7):
            beside = block[:, :j] - q[:, :j] @ (q[:, :j].mT @ block[:, :j])
            assert beside.norm() <= allowed * block[:, :j].norm()
    square = torch.zeros(3, 6, 6, dtype=dtype)
    square[1, :, :2] = gaussian(6, 2)
    square[2] = gaussian(6, 6)
    for q in orthonormal_basis(square, seeded()):
        assert_orthonormal(q, allowed)


def test_the_small_algebra_is_not_in_bfloat16_under_autocast():
    blocks = gaussian(2, 40, 6, dtype=torch.float32)
    plain = orthonormal_basis(blocks, seeded())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthonormal_basis(blocks, seeded()), plain)


def test_a_generator_stays_on_its_own_device():
    generator = seeded()
    assert generator_on(torch.device("cpu"), generator) is generator


@pytest.mark.gpu
def test_a_generator_for_a_gpu_is_seeded_from_the_one_on_the_cpu():
    draws = [torch.randn(5, generator=generator_on(torch.device("cuda"), seeded(s)), device="cuda") for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    matrices = [g.float() for g in many().values()]
    for rank in (8, 24):  # 2 (24 + 16) columns are more than the library's batched eigensolver takes
        here = Matrices(matrices).svd(rank, oversampling=16, power_steps=3, dtype=torch.float32)
        on_gpu = Matrices([g.cuda() for g in matrices])
        there = randomized_svd(
            on_gpu.multiply,
            on_gpu.multiply_transposed,
            [tuple(g.shape) for g in matrices],
            rank,
            oversampling=16,
            power_steps=3,
            generator=seeded(),
            device="cuda",
        )
        for one, other in zip(here, there, strict=True):
            assert_orthonormal(other.u.cpu(), 1e-6)
            assert_orthonormal(other.v.cpu(), 1e-6)
            assert (one.s[:rank] - other.s[:rank].cpu()).abs().max() <= 1e-3 * one.s.max().clamp_min(1e-30)
