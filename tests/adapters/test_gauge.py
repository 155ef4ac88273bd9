"""The gauge: factor gradients are products of the dense gradient; points are read and written without loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from adapted_models import KINDS, OneLayer, gpt2, llama, one_layer, randomise, unet
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_rlora.adapters import balanced_factors, find_pairs, group_by_shape, matrix, read_points, write_point
from lightning_rlora.adapters.gauge import START, read_point, start_factors
from lightning_rlora.geometry import Point, random_point


def relative(x, y):
    return float((x - y).norm() / y.norm())


def check_products(pair, gradient, tolerance):
    """grad_B = c G A^T, grad_A = c B^T G."""
    assert float(gradient.norm()) > 0
    a, b = matrix(pair.a).detach(), matrix(pair.b).detach()
    assert relative(matrix(pair.b.grad), pair.scaling * gradient @ a.mT) < tolerance
    assert relative(matrix(pair.a.grad), pair.scaling * b.mT @ gradient) < tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"layer": 2}}, {"r": 1}], ids=str)
def test_factor_gradients_are_the_dense_gradients_products(kind, fields):
    case = one_layer(kind, **fields)
    (pair,) = find_pairs(case.model)
    case.model(case.x).backward()
    check_products(pair, case.dense_gradient(), 1e-13)  # measured at most 6e-16


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_balanced_gauge_a_division_of_columns_gives_the_projections_products(kind):
    case = one_layer(kind)
    (pair,) = find_pairs(case.model)
    b, a = matrix(pair.b).detach(), matrix(pair.a).detach()
    point = read_point(b, a, pair.scaling)
    write_point(pair, point)
    assert torch.allclose(pair.b.flatten(1).norm(dim=0), pair.a.flatten(1).norm(dim=1), rtol=1e-12)
    case.model(case.x).backward()
    gradient = case.dense_gradient()
    root = (pair.scaling * point.s).sqrt()
    assert relative(matrix(pair.b.grad) / root, gradient @ point.v) < 1e-12  # measured at most 6e-16
    assert relative(matrix(pair.a.grad).mT / root, gradient.mT @ point.u) < 1e-12


@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_every_layer_of_a_language_model(make):
    model = get_peft_model(make().double(), LoraConfig(r=3, lora_alpha=4, target_modules="all-linear")).double()
    check_whole_model(randomise(model), lambda: model(torch.arange(12).reshape(2, 6)).logits.square().sum().backward())


def test_every_layer_of_a_unet():
    model = unet().double()
    targets = ["to_q", "to_v", "conv1", "conv_shortcut", "proj_in", "time_emb_proj", "conv_in"]
    model.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets))
    model.double()
    x, text = torch.randn(1, 4, 8, 8).double(), torch.randn(1, 3, 8).double()
    check_whole_model(randomise(model), lambda: model(x, 7, text).sample.square().sum().backward())


def check_whole_model(model, backward):
    """Without dropout or DoRA the function depends on W + c B A alone, so the base weight's own gradient is G."""
    pairs = find_pairs(model)
    for pair in pairs:
        pair.layer.base_layer.weight.requires_grad_(True)
    backward()
    for pair in pairs:
        gradient = pair.layer.base_layer.weight.grad
        gradient = gradient.T if type(pair.layer.base_layer).__name__ == "Conv1D" else gradient.flatten(1)
        check_products(pair, gradient, 1e-12)  # measured at most 1e-15


def test_dropout_enters_the_gradient_of_the_product():
    case = one_layer("Linear", lora_dropout=0.5)
    (pair,) = find_pairs(case.model)
    case.model.train()
    torch.manual_seed(3)
    case.model(case.x).backward()
    torch.manual_seed(3)
    dropped = F.dropout(case.x, 0.5)
    delta = case.peft_layer.get_delta_weight("default").detach().requires_grad_(True)
    base = case.peft_layer.base_layer

    class Dense(nn.Module):
        def forward(self, x):
            return base(x) + F.linear(dropped, delta)

    OneLayer(Dense())(case.x).backward()
    assert bool((dropped == 0).any())
    check_products(pair, delta.grad, 1e-13)


@pytest.mark.parametrize("kind", ["Linear", "Conv1D", "Conv2d", "Embedding"])
def test_dora_gives_the_products_of_its_norm_detached_gradient(kind):
    case = one_layer(kind, use_dora=True)
    (pair,) = find_pairs(case.model)
    magnitude = case.peft_layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(torch.linspace(0.5, 2, magnitude.numel(), dtype=torch.float64).reshape(magnitude.shape))
    case.model(case.x).backward()

    base = case.peft_layer.base_layer
    weight = case.as_matrix(base.weight.detach())
    delta = (pair.scaling * matrix(pair.b) @ matrix(pair.a)).detach().requires_grad_(True)
    norm = (weight + delta.detach()).norm(dim=1, keepdim=True)
    trained = magnitude.detach().reshape(-1, 1) / norm * (weight + delta)

    class Dense(nn.Module):
        def forward(self, x):
            if kind == "Embedding":
                return F.embedding(x, trained.T)
            if kind == "Conv2d":
                return F.conv2d(x, trained.reshape(base.weight.shape), base.bias, stride=2, padding=1)
            return F.linear(x, trained, base.bias)

    dense = OneLayer(Dense())(case.x)
    assert relative(case.model(case.x), dense) < 1e-12
    dense.backward()
    check_products(pair, delta.grad, 1e-12)  # measured at most 4e-16


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(quantised_llama, bits):
    model = get_peft_model(quantised_llama(bits), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomise(model)
    pairs = find_pairs(model)
    assert len(pairs) == 4
    seen = {}
    for pair in pairs:

        def record(layer, inputs, output):
            output.retain_grad()
            seen[layer] = inputs[0].detach(), output

        pair.layer.register_forward_hook(record)
    model(torch.arange(12).reshape(2, 6)).logits.square().sum().backward()
    for pair in pairs:
        x, y = seen[pair.layer]
        gradient = y.grad.flatten(0, 1).double().mT @ x.flatten(0, 1).double()
        check_products(pair, gradient.float(), 1e-5)  # measured at most 3e-7


def test_read_point_is_the_svd_of_the_product():
    b, a = torch.randn(2, 6, 3), torch.randn(2, 3, 8)
    point = read_point(b, a, 1.7)
    assert all(part.dtype == torch.float64 for part in point)
    dense = 1.7 * b.double() @ a.double()
    assert relative(point.u * point.s[:, None] @ point.v.mT, dense) < 1e-14
    assert torch.allclose(point.s, torch.linalg.svdvals(dense)[:, :3], rtol=1e-13)
    new_b, new_a = balanced_factors(point, 1.7)
    assert relative(1.7 * new_b @ new_a, dense) < 1e-14


def test_read_point_of_a_rank_deficient_product_still_has_orthonormal_bases():
    b, a = torch.randn(6, 3), torch.randn(3, 8)
    b[:, 2] = b[:, 0]
    a[2] = 0
    point = read_point(b, a, 1.0)
    assert float(point.s[2]) < 1e-14
    for basis in (point.u, point.v):
        assert torch.allclose(basis.mT @ basis, torch.eye(3, dtype=torch.float64), atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_write_point_keeps_the_function(kind):
    case = one_layer(kind)
    (pair,) = find_pairs(case.model)
    before = case.peft_layer.get_delta_weight("default").detach().clone()
    point = Point(*(part[0] for part in read_points([pair])))
    a, b = pair.a, pair.b
    write_point(pair, point)
    assert pair.layer.get_delta_weight("default").shape == before.shape
    assert relative(case.peft_layer.get_delta_weight("default"), before) < 1e-14
    assert find_pairs(case.model)[0].a is a
    assert find_pairs(case.model)[0].b is b
    again = read_points([pair])
    assert torch.allclose(again.s[0], point.s, rtol=1e-13)


def test_groups_can_be_stacked_and_lose_no_pair():
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "k_proj"], alpha_pattern={"o_proj": 3})
    )
    pairs = find_pairs(randomise(model))
    groups = group_by_shape(pairs)
    assert sorted(len(group) for group in groups) == [2, 2, 2]  # q and o differ by their scaling, k by its shape
    assert sorted(p.name for group in groups for p in group) == sorted(p.name for p in pairs)
    for group in groups:
        points = read_points(group)
        for i, pair in enumerate(group):
            dense = pair.layer.get_delta_weight("default").double()
            assert relative(points.u[i] * points.s[i] @ points.v[i].mT, dense) < 1e-6


def started(b, a, c=2.0, seed=0):
    b, a = b.clone(), a.clone()
    needed = start_factors(b, a, c, torch.Generator().manual_seed(seed))
    return needed, b, a


def zeroed(which):
    b, a = torch.randn(7, 3), torch.randn(3, 9)
    if "B" in which:
        b.zero_()
    if "A" in which:
        a.zero_()
    return b, a


@pytest.mark.parametrize("which", ["B", "A", "AB"])
def test_zero_factors_start_on_the_manifold_without_moving_the_function(which):
    b, a = zeroed(which)
    needed, new_b, new_a = started(b, a)
    assert needed
    singular = torch.linalg.svdvals(2.0 * new_b.double() @ new_a.double())
    assert torch.allclose(singular[:3], torch.full((3,), START, dtype=torch.float64), rtol=1e-5)
    # the outputs of a layer of ordinary size move by a dozen units of float32's rounding at most; measured 7e-7
    weight, x = torch.randn(7, 9) / 3, torch.randn(100, 9)
    moved = (F.linear(x, weight + 2.0 * new_b @ new_a) - F.linear(x, weight)).norm() / F.linear(x, weight).norm()
    assert float(moved) < 1.5e-6
    again = read_point(new_b, new_a, 2.0)
    if which == "B":
        assert relative(again.v @ (again.v.mT @ a.double().mT), a.double().mT) < 1e-5
    if which == "A":
        assert relative(again.u @ (again.u.mT @ b.double()), b.double()) < 1e-5


@pytest.mark.parametrize("which", ["B", "A", "AB"])
def test_the_start_depends_on_the_generator_alone(which):
    b, a = zeroed(which)
    _, b1, a1 = started(b, a)
    torch.randn(5)
    _, b2, a2 = started(b, a)
    _, b3, _ = started(b, a, seed=1)
    assert torch.equal(b1, b2)
    assert torch.equal(a1, a2)
    assert not torch.equal(b1, b3)


def test_full_rank_factors_stay_as_they_are():
    b, a = torch.randn(7, 3), 1e-9 * torch.randn(3, 9)
    needed, new_b, new_a = started(b, a)
    assert not needed
    assert torch.equal(b, new_b)
    assert torch.equal(a, new_a)


def test_a_rank_deficient_product_is_completed_and_kept():
    b, a = torch.randn(7, 3), torch.randn(3, 9)
    b[:, 1] = 0
    needed, new_b, new_a = started(b, a)
    assert needed
    before, after = 2.0 * b.double() @ a.double(), 2.0 * new_b.double() @ new_a.double()
    assert float(torch.linalg.matrix_norm(after - before, 2)) < 4e-6  # START and the rounding of float32 factors
    assert float(torch.linalg.svdvals(after)[2]) > 0.9 * START


def test_the_start_in_half_precision_is_not_lost():
    b, a = torch.zeros(7, 3, dtype=torch.float16), torch.randn(3, 9).half()
    _, new_b, new_a = started(b, a)
    singular = torch.linalg.svdvals(2.0 * new_b.double() @ new_a.double())[:3]
    assert torch.allclose(singular, torch.full((3,), START, dtype=torch.float64), rtol=1e-2)


def test_convolution_factors_start_in_place():
    case = one_layer("Conv2d", dtype=torch.float32)
    (pair,) = find_pairs(case.model)
    with torch.no_grad():
        pair.b.zero_()
        assert start_factors(pair.b, pair.a, pair.scaling, torch.Generator().manual_seed(0))
    assert pair.a.shape == (3, 3, 3, 3)
    assert torch.allclose(read_points([pair]).s[0], torch.full((3,), START, dtype=torch.float64), rtol=1e-5)


def test_a_factor_that_is_deficient_to_the_rounding_of_its_dtype_gets_a_start():
    """Columns that are combinations of others, rounded to float32: their Gram matrix has no Cholesky root."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(64, 4, generator=generator, dtype=torch.float64)
    b = torch.cat([half, half @ torch.randn(4, 4, generator=generator, dtype=torch.float64)], 1).float()
    a = torch.randn(8, 48, generator=generator)
    before = (b.double() @ a.double()).clone()
    assert start_factors(b, a, 1.0, generator)
    point = read_point(b, a, 1.0)
    assert point.s[-1] > 0.5 * START
    assert (b.double() @ a.double() - before).norm() < 1e-5 * before.norm()  # measured 6e-7
    assert not start_factors(b, a, 1.0, generator)  # and is a point from then on


@pytest.mark.parametrize("spread", [1e-4, 1e-8, 1e-14])
def test_points_with_small_singular_values_are_left_alone(spread):
    point = random_point(64, 48, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    point = point._replace(s=torch.logspace(0, math.log10(spread), 6, dtype=torch.float64))
    b, a = (factor.float() for factor in balanced_factors(point, 2.0))
    assert not start_factors(b, a, 2.0, torch.Generator().manual_seed(0))
