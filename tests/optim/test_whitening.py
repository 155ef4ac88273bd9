"""Whitened Riemannion against full m x n matrices in float64."""

import io

import pytest
import torch
from dense_steps import relative
from dense_whitening import Whitened, whitened_start, whitened_step
from peft_layers import adapted, hand_over, mixing, products, refactor

from lightning_rlora.adapters import find_pairs
from lightning_rlora.errors import UserError
from lightning_rlora.geometry import RANK_TOLERANCE, point_to_dense, random_point
from lightning_rlora.optim import Riemannion, WhitenedRiemannion
from lightning_rlora.optim.reference import whitened_reference_step
from lightning_rlora.optim.whitening import row_weights

R = 3
OPTIONS = {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.1}
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]


def spread_gradients(m, n, steps, seed=1):
    """A drift and noise, with rows and columns of sizes from 0.01 to 1."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (10 ** (-2 * torch.rand(k, generator=generator, dtype=torch.float64)) for k in (m, n))
    drift, *noise = torch.randn(steps + 1, m, n, generator=generator, dtype=torch.float64)
    return [rows.unsqueeze(1) * (drift + other) * columns for other in noise]


def the_gradients(model, steps):
    """Gradients of every pair, a list (of steps) of lists (of pairs)."""
    of_pairs = [spread_gradients(*pair.shape[:2], steps, seed) for seed, pair in enumerate(find_pairs(model))]
    return [list(step) for step in zip(*of_pairs, strict=True)]


def run(model, gradients, *, optimizer=None, before_step=lambda step, pairs: None):
    optimizer = optimizer or WhitenedRiemannion.for_model(model, **OPTIONS)
    pairs = find_pairs(model)
    for number, step in enumerate(gradients):
        before_step(number, pairs)
        hand_over(pairs, step)
        optimizer.step()
    return optimizer


def dense_run(starts, gradients, dtype, **options):
    """The oracle of every product, after each step."""
    points, after = [whitened_start(x) for x in starts], []
    for step in gradients:
        points = [
            whitened_step(d, g, R, tolerance=RANK_TOLERANCE[dtype], **(OPTIONS | options))
            for d, g in zip(points, step, strict=True)
        ]
        after.append(points)
    return after


def worst_error(got, expected: list[Whitened]):
    return max(relative(x, d.x) for x, d in zip(got, expected, strict=True))


@pytest.fixture(scope="module", params=DTYPES)
def case(request):
    """The dtype, the gradients and the oracle's points after every step."""
    model = adapted(request.param)
    gradients = the_gradients(model, 200)
    return request.param, gradients, dense_run(products(model), gradients, request.param)


def check(model, case, what, allowed):
    error = worst_error(products(model), case[2][-1])
    print(f"\n{what}, {case[0]}: {error:.1e}")
    assert error <= allowed[case[0]]


@pytest.mark.parametrize("shape", [(14, 11), (5, 17), (3, 9)])
def test_the_reference_step_follows_the_dense_iteration(shape):
    x = point_to_dense(random_point(*shape, R, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    dense, m = whitened_start(x), torch.zeros_like(x)
    curvatures = x.new_zeros(shape[0]), x.new_zeros(shape[1])
    for g in spread_gradients(*shape, 20):
        dense = whitened_step(dense, g, R, tolerance=RANK_TOLERANCE[torch.float64], **OPTIONS)
        x, m, curvatures = whitened_reference_step(x, m, curvatures, g, R, **OPTIONS)
    errors = [relative(x, dense.x), relative(m, dense.m), relative(curvatures[0].square(), dense.p)]
    assert max(errors) < 1e-11  # measured 2e-14


def test_follows_the_dense_iteration(case):
    dtype, gradients, after = case
    model = adapted(dtype)
    start = products(model)
    optimizer = run(model, gradients[:20])
    early = worst_error(products(model), after[19])
    run(model, gradients[20:], optimizer=optimizer)
    late = worst_error(products(model), after[-1])
    print(f"\n{dtype}: {early:.1e} after 20 steps, {late:.1e} after 200")
    assert early < {torch.float64: 1e-11, torch.float32: 1e-4}[dtype]
    assert late < {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    assert min(relative(x, y) for x, y in zip(products(model), start, strict=True)) > 0.5  # it has gone somewhere
