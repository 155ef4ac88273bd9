"""RiemannianSGD against the dense float64 computation of Algorithm 6 (arXiv 2507.12142)."""

import pytest
import torch
from dense_steps import Dense, dense_start, dense_step, relative, sgd_direction, tangent_part
from peft_layers import adapted, dense_run, hand_over, mixing, products, random_gradients, refactor, worst_error

from lightning_rlora.adapters import find_pairs
from lightning_rlora.optim import RiemannianSGD

STEPS = 60
LR, MOMENTUM, DECAY, BETA = 0.02, 0.9, 0.1, 0.95
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
ALLOWED = {torch.float64: 1e-11, torch.float32: 5e-5}


class SimulatedAdam:
    """The direction of one pair: each tangent factor over the bias-corrected running average of that of P(G)."""

    def __init__(self) -> None:
        self.average = torch.zeros(2, dtype=torch.float64)
        self.steps = 0

    def see(self, d: Dense, g: torch.Tensor) -> None:
        xi = tangent_part(d.u, d.v, g)
        inside = d.u @ (d.u.mT @ xi)
        norms = torch.stack([(xi - inside).norm(), inside.norm()])
        self.steps += 1
        self.average = BETA * self.average + (1 - BETA) * norms

    def __call__(self, d: Dense) -> torch.Tensor:
        corrected = self.average / (1 - BETA**self.steps) + 1e-8
        inside = d.u @ (d.u.mT @ d.m)
        return (d.m - inside) / corrected[0] + inside / corrected[1]


def the_gradients(model):
    generator = torch.Generator().manual_seed(1)
    pairs = find_pairs(model)
    drift = random_gradients(pairs, generator)
    return [
        [0.1 * (d + g) for d, g in zip(drift, random_gradients(pairs, generator), strict=True)] for _ in range(STEPS)
    ]


def oracle(starts, gradients, simulate_adam):
    options = {"lr": LR, "momentum": MOMENTUM, "gradient_weight": 1 - MOMENTUM, "weight_decay": DECAY}
    if not simulate_adam:
        return dense_run(starts, 3, gradients, sgd_direction, **options)
    points = [dense_start(x, 3) for x in starts]
    directions = [SimulatedAdam() for _ in starts]
    for step in gradients:
        for i, g in enumerate(step):
            directions[i].see(points[i], g)
            points[i] = dense_step(points[i], g, directions[i], **options)
    return points


@pytest.mark.parametrize("simulate_adam", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_the_dense_iteration_however_factored(dtype, simulate_adam):
    model = adapted(dtype)
    start, gradients = products(model), the_gradients(adapted(dtype))
    expected = oracle(start, gradients, simulate_adam)
    for condition in (None, 100.0):
        model = adapted(dtype)
        pairs = find_pairs(model)
        generator = torch.Generator().manual_seed(2)
        optimizer = RiemannianSGD.for_model(
            model, lr=LR, momentum=MOMENTUM, weight_decay=DECAY, simulate_adam=simulate_adam, betas=(0.9, BETA)
        )
        for number, step in enumerate(gradients):
            if condition is not None and number in (0, STEPS // 2):
                for pair in pairs:
                    refactor(pair, mixing(3, condition, generator))
            hand_over(pairs, step)
            optimizer.step()
        error = worst_error(products(model), expected)
        print(f"\nsimulate_adam {simulate_adam}, cond {condition}, {dtype}: {error:.1e}")
        assert error <= ALLOWED[dtype]  # measured 4e-14, 3e-6
        assert min(relative(x, y) for x, y in zip(products(model), start, strict=True)) > 0.02


def test_without_momentum_and_decay_a_small_step_is_gradient_descent_on_the_manifold():
    model = adapted(torch.float64)
    pairs = find_pairs(model)
    optimizer = RiemannianSGD.for_model(model, lr=1e-6, momentum=0.0)
    before = products(model)
    gradients = random_gradients(pairs, torch.Generator().manual_seed(5))
    hand_over(pairs, gradients)
    optimizer.step()
    for x, y, g in zip(before, products(model), gradients, strict=True):
        u, _, vt = torch.linalg.svd(x)
        expected = -1e-6 * tangent_part(u[:, :3], vt[:3].mT, g)
        assert relative(y - x, expected) < 1e-4  # the retraction's second order: measured 2e-5


def test_a_zero_gradient_moves_nothing_under_simulated_adam():
    model = adapted()
    optimizer = RiemannianSGD.for_model(model, lr=LR, simulate_adam=True)
    pairs = find_pairs(model)
    before = products(model)
    for _ in range(3):
        hand_over(pairs, [torch.zeros(p.shape[:2], dtype=torch.float64) for p in pairs])
        optimizer.step()
    assert max(relative(x, y) for x, y in zip(products(model), before, strict=True)) < 1e-6  # measured 3e-7
