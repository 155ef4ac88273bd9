"""The Triton kernels against dense float64 computations: on the CPU through the interpreter, on a GPU as compiled."""

import pytest
import torch

pytest.importorskip("triton", reason="the fast step is written in Triton")

from lightning_rlora.geometry import gram
from lightning_rlora.optim.anchors import sketch
from lightning_rlora.optim.cuda import product_kernels, products
from lightning_rlora.optim.cuda.small_kernels import cholesky, orthogonal_columns, warps
from lightning_rlora.optim.cuda.tall_passes import TallPasses
from lightning_rlora.optim.whitening import row_weights, with_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(4, [(20, 33), (50, 17)]), (3, [(20, 48)]), (16, [(48, 32)]), (20, [(40, 50)]), (70, [(80, 100)])]


class Tall:
    """Random factors, gradients and momenta of pairs, and the passes over them."""

    def __init__(self, rank, shapes, aligned=False, whitened=False):
        generator = torch.Generator().manual_seed(0)
        sides = [side for m, n in shapes for side in ((m, rank), (rank, n))]
        draw = [torch.randn(3, *side, generator=generator).to(DEVICE) for side in sides]
        self.factors, self.gradients, self.momenta = ([one[i] for one in draw] for i in range(3))
        self.rank = rank
        heights = [x.numel() // rank for x in self.factors]
        self.passes = TallPasses(heights, rank, torch.device(DEVICE), aligned=aligned, whitened=whitened)
        addresses = [[x.data_ptr() for x in tall] for tall in (self.factors, self.gradients, self.momenta)]
        self.passes.table[:3].copy_(torch.tensor(addresses))
        self.weights = torch.rand(len(sides), rank, generator=generator).to(DEVICE)
        self.kept = torch.rand(len(sides), generator=generator).to(DEVICE)
        self.frames = [torch.ones(height, 1, dtype=torch.float64, device=DEVICE) for height in heights]
        if whitened:
            self.curvatures = [10 ** (-25 - 4 * torch.rand(k, generator=generator)).to(DEVICE) for k in heights]
            self.curvatures[1].zero_()  # nothing known
            self.floors = torch.linspace(0.001, 0.1, len(sides), dtype=torch.float64, device=DEVICE)
            self.passes.table[3].copy_(torch.tensor([x.data_ptr() for x in self.curvatures]))
            self.passes.weigh_rows(self.floors)
            found = zip(self.passes._row_weights, heights, strict=True)
            self.frames = [weights[:height].double().unsqueeze(1) for weights, height in found]

    def tall(self, tensor, i):
        return tensor.double() if i % 2 == 0 else tensor.double().mT

    def side(self, i):
        """[B N] of a side in float64, in its frame."""
        b, g, m = (self.tall(x[i], i) for x in (self.factors, self.gradients, self.momenta))
        return torch.cat([b * self.frames[i], (g * self.weights[i] + self.kept[i] * m) / self.frames[i]], 1)


with_and_without_frame = pytest.mark.parametrize("whitened", [False, True], ids=["plain", "whitened"])


@with_and_without_frame
@pytest.mark.parametrize(("rank", "shapes"), CASES)
def test_gram(rank, shapes, whitened):
    tall = Tall(rank, shapes, aligned=rank == 16, whitened=whitened)
    found = tall.passes.gram(tall.weights, tall.kept)
    for i, n in enumerate(found):
        w = tall.side(i)
        assert (n - w.mT @ w).norm() < 1e-7 * n.norm()  # measured 3e-8, the rounding of N; the sums are exact


def test_row_weights():
    """Also of a side higher than a block of the kernel, and of one of which nothing is known."""
    tall = Tall(1, [(9000, 20), (33, 40)], whitened=True)
    for frame, curvature, floor in zip(tall.frames, tall.curvatures, tall.floors, strict=True):
        assert torch.allclose(
            frame.squeeze(1), row_weights(curvature.double(), float(floor)), rtol=1e-6
        )  # measured 2e-7
    assert (tall.frames[1] == 1).all()


@with_and_without_frame
@pytest.mark.parametrize(("rank", "shapes"), CASES)
def test_apply(rank, shapes, whitened):
    tall = Tall(rank, shapes, aligned=rank == 16, whitened=whitened)
    sides = len(tall.factors)
    t = torch.randn(sides, 2 * rank, 2 * rank, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    skip = torch.zeros(sides // 2, dtype=torch.int32, device=DEVICE)
    if len(shapes) > 1:
        skip[1] = 1
    expected = []
    for i in range(sides):
        w = tall.side(i)
        new = w @ t[i].double()
        new[:, :rank] += w[:, :rank]
        expected.append(torch.cat([new[:, :rank] / tall.frames[i], new[:, rank:] * tall.frames[i]], 1))
    kept = [(tall.factors[i].clone(), tall.momenta[i].clone()) for i in range(sides)]
    if whitened:
        decays = torch.linspace(0.9, 0.99, sides, dtype=torch.float64, device=DEVICE)
        at_bases = 1e-25 * torch.randn(sides, rank, rank, generator=torch.Generator().manual_seed(2)).to(DEVICE)
        curvatures = [curvature.clone() for curvature in tall.curvatures]
        for i in range(sides):
            if not skip[i // 2]:
                seen = tall.tall(tall.gradients[i], i) @ at_bases[i].double()
                curvatures[i] = with_rows(curvatures[i], seen.square().sum(1), float(decays[i])).float()
        tall.passes.apply(tall.weights, tall.kept, t, skip, decays, at_bases)
        for found, want in zip(tall.curvatures, curvatures, strict=True):
            assert torch.allclose(found, want, rtol=1e-5, atol=0)  # measured 4e-7
    else:
        tall.passes.apply(tall.weights, tall.kept, t, skip)
    for i in range(sides):
        found = tall.factors[i], tall.momenta[i]
        if skip[i // 2]:
            assert torch.equal(found[0], kept[i][0]) and torch.equal(found[1], kept[i][1])
            continue
        for part, want in zip(found, expected[i].split(rank, 1), strict=True):
            part = tall.tall(part, i)
            assert (part - want).norm() < 1e-6 * want.norm()  # measured 6e-8; 3e-7 with TF32 in three parts


def test_sketch():
    tall = Tall(3, [(20, 300), (77, 5)])
    for i, found in enumerate(tall.passes.sketch()):
        factor = tall.factors[i] if i % 2 == 0 else tall.factors[i].mT
        assert torch.allclose(found, sketch(factor[None])[0], atol=1e-5)


@pytest.mark.parametrize("k", [1, 5, 16, 33, 70])
def test_cholesky(k):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 2 * k + 2, k, generator=generator, dtype=torch.float64).to(DEVICE)
    w = w * 10.0 ** -torch.linspace(0, 8, k, dtype=torch.float64).to(DEVICE)  # sizes of columns spread widely
    n = w.mT @ w
    root, inverse = cholesky(n)
    assert torch.equal(root, root.triu())
    size = n.diagonal(dim1=1, dim2=2).sqrt()
    assert ((root.mT @ root - n).abs() <= 1e-13 * size.unsqueeze(1) * size.unsqueeze(2)).all()
    assert (root @ inverse - torch.eye(k, dtype=n.dtype, device=DEVICE)).abs().max() < 1e-10


@pytest.mark.parametrize("copies", [1, 9])
def test_cholesky_with_a_floor(copies):
    """Of matrices with that many diagonal blocks, so that the larger ones are done in parts."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 9, 5, generator=generator, dtype=torch.float64).to(DEVICE)
    w[1, :, 2] = w[1, :, 0] - w[1, :, 1]
    w[2, :, 0] = 0
    w[3] = 0
    w = torch.stack([torch.block_diag(*[one] * copies) for one in w])
    n = w.mT @ w
    floor = 1e-12 * n.diagonal(dim1=1, dim2=2).sum(-1)
    root, inverse = cholesky(n, floor)
    assert (root.mT @ root - n).abs().max() < 1e-12
    found = inverse.mT @ n @ inverse
    kept = found.diagonal(dim1=1, dim2=2).round()
    assert kept.sum(1).tolist() == [5 * copies, 4 * copies, 4 * copies, 0]
    assert (found - kept.diag_embed()).abs().max() < 1e-12
    assert (inverse[kept.unsqueeze(1).expand_as(n) == 0] == 0).all() and (
        root[kept.unsqueeze(2).expand_as(n) == 0] == 0
    ).all()


def test_cholesky_with_a_floor_takes_the_best_conditioned_columns():
    """Twelve random columns in eight dimensions: the first eight alone can be nearly dependent."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(40, 8, 12, generator=generator, dtype=torch.float64).to(DEVICE)
    n = w.mT @ w
    _, inverse = cholesky(n, 1e-12 * n.diagonal(dim1=1, dim2=2).sum(-1))
    assert ((inverse != 0).any(1).sum(1) == 8).all()
    own_order = torch.linalg.inv(torch.linalg.cholesky(n[:, :8, :8])).abs().max()
    assert inverse.abs().max() < 0.1 * own_order  # measured 4 and 61


@pytest.mark.parametrize("shape", [(2, 2), (6, 6), (7, 6), (16, 16)])
def test_orthogonal_columns(shape):
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(DEVICE)
    k[1] = k[1, :, :1] @ k[1, :1]  # rank one
    k[2] = 0
    y = orthogonal_columns(k)
    sizes = y.norm(dim=1)
    expected = torch.linalg.svdvals(k)
    assert (sizes.sort(descending=True)[0] - expected).abs().max() < 1e-13 * expected.max()  # measured 2e-15
    unit = y[0] / sizes[0]
    assert (unit.mT @ unit - torch.eye(shape[1], dtype=k.dtype, device=DEVICE)).abs().max() < 1e-10
    assert (y @ y.mT - k @ k.mT).abs().max() < 1e-12  # the columns were only rotated


def test_odd_polynomials_start_again_where_the_first_few_do_not_do():
    generator = torch.Generator().manual_seed(0)
    n, tolerance = 32, 1e-5
    u, v = (torch.linalg.qr(torch.randn(4, n, n, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    values = torch.logspace(0, -1, n, dtype=torch.float64).repeat(4, 1)
    values[1, -1] = 1e-4  # needs them all
    values[2, 5:] = 0
    values[3, -1] = 1e-6  # neither 0 nor 1 in the end
    k = ((u * values.unsqueeze(1)) @ v.mT).to(DEVICE)
    few = products.first_coefficients()
    coefficients = torch.tensor([*few, *products.polar_coefficients(tolerance)], dtype=torch.float64, device=DEVICE)
    found, defect = product_kernels.odd_polynomials(k.contiguous(), coefficients, len(few), 1e-11)
    wanted = gram.polar_factor(k, tolerance)
    assert (defect <= 1e-11).tolist() == [True, True, True, False]
    assert (found - wanted)[:3].norm(dim=(1, 2)).max() < 1e-10  # measured 4e-12


def test_purification_finds_the_leading_space():
    generator = torch.Generator().manual_seed(0)
    n, rank = 32, 5
    v = torch.linalg.qr(torch.randn(3, n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -2, n, dtype=torch.float64)
    x = ((v * values) @ v.mT).to(DEVICE)
    buffers = torch.stack([x, torch.full_like(x, torch.nan)], 1).contiguous()
    trace, square = x.diagonal(dim1=1, dim2=2).sum(1), x.square().sum((1, 2))
    skip = torch.tensor([0, 1, 0], dtype=torch.int32, device=DEVICE)
    product_kernels.purify(buffers, trace, square, skip, rank, 100, 1e-13)
    leading = (v[:, :, :rank] @ v[:, :, :rank].mT).to(DEVICE)
    assert (buffers[:, 0] - leading)[::2].abs().max() < 1e-10  # measured 2e-13
    assert torch.equal(buffers[1, 0], x[1])


def test_numbers_of_warps_are_powers_of_two():
    for k in range(1, 257):
        assert warps(k * k // 512, 8) in (1, 2, 4, 8)
