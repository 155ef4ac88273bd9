"""Balancing factors under optimizers that do not keep the gauge."""

import pytest
import torch
from dense_steps import relative
from peft_layers import adapted, hand_over, mixing, products, random_gradients, refactor

from lightning_rlora.adapters import find_pairs, group_by_shape, matrix
from lightning_rlora.optim.balance import balance, imbalance

DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
}


def worst_imbalance(pairs):
    return max(float(imbalance(batch).max()) for batch in group_by_shape(pairs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("condition", [1.0, 1e3])
def test_product_is_kept_and_factors_are_balanced(dtype, condition):
    model = adapted(dtype)
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(0)
    for pair in pairs:
        refactor(pair, mixing(3, condition, generator))
    before = products(model)
    assert worst_imbalance(pairs) > 0.1
    assert balance(pairs, {}) == 0
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}[dtype]  # measured 7e-15, 3e-7
    assert max(relative(x, y) for x, y in zip(products(model), before, strict=True)) < tolerance
    assert worst_imbalance(pairs) < tolerance
    for pair, x in zip(pairs, before, strict=True):
        s = torch.linalg.svdvals(x)[:3]
        expected = torch.diag(s / pair.scaling)
        a, b = matrix(pair.a).detach().double(), matrix(pair.b).detach().double()
        assert (b.mT @ b - expected).abs().max() < tolerance * s[0]
        assert (a @ a.mT - expected).abs().max() < tolerance * s[0]


def test_imbalance_sees_each_kind():
    """Unequal norms, and correlated columns on one side or on both."""
    (pair,) = find_pairs(adapted(torch.float64, target_modules=["linear"]))
    balance([pair], {})
    assert imbalance([pair])[0] < 1e-12
    for s in (
        torch.diag(torch.tensor([1.01, 1.0, 1.0], dtype=torch.float64)),
        torch.eye(3, dtype=torch.float64) + torch.diag(torch.tensor([0.01, 0.0], dtype=torch.float64), 1),
        mixing(3, 1.0, torch.Generator().manual_seed(0)),
    ):
        refactor(pair, s)
        assert 1e-3 < imbalance([pair])[0] < 3
        balance([pair], {})
        assert imbalance([pair])[0] < 1e-12


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_first_moments_are_those_of_the_new_gauge(make):
    """The oracle runs the same history of gradients with factors that stand in the new gauge from the start."""
    model = adapted(torch.float64)
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = make([f for pair in pairs for f in (pair.a, pair.b)])
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the factors stand still, so that the history has one gauge
        group["weight_decay"] = 0.0
    history = [random_gradients(pairs, generator) for _ in range(4)]
    for gradients in history:
        hand_over(pairs, gradients)
        optimizer.step()
    states = optimizer.state.items()
    second = {id(f): state["exp_avg_sq"].clone() for f, state in states if "exp_avg_sq" in state}
    balance(pairs, optimizer.state)
    name = "exp_avg" if second else "momentum_buffer"
    moved = {id(f): optimizer.state[f][name].clone() for pair in pairs for f in (pair.a, pair.b)}

    fresh = make([f for pair in pairs for f in (pair.a, pair.b)])
    for group in fresh.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
    for gradients in history:
        hand_over(pairs, gradients)
        fresh.step()
    for pair in pairs:
        for f in (pair.a, pair.b):
            assert relative(moved[id(f)], fresh.state[f][name]) < 1e-11  # measured 5e-15
            if second:
                assert torch.equal(optimizer.state[f]["exp_avg_sq"], second[id(f)])


def test_first_moments_as_functionals():
    """<moment_A, dA> + <moment_B, dB> is the same number for the same move of the product before and after."""
    model = adapted(torch.float64)
    pairs = find_pairs(model)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW([f for pair in pairs for f in (pair.a, pair.b)], lr=0.01)
    for _ in range(3):
        hand_over(pairs, random_gradients(pairs, generator))
        optimizer.step()
    old = [(matrix(p.a).detach().clone(), matrix(p.b).detach().clone()) for p in pairs]
    moments = [[matrix(optimizer.state[f]["exp_avg"]).clone() for f in (p.a, p.b)] for p in pairs]
    balance(pairs, optimizer.state)
    for pair, (a, b), (m_a, m_b) in zip(pairs, old, moments, strict=True):
        s = matrix(pair.a).detach() @ torch.linalg.pinv(a)  # A' = S A
        assert (s - torch.eye(3)).abs().max() > 0.1
        for _ in range(5):
            d_a = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            d_b = torch.randn(b.shape, generator=generator, dtype=torch.float64)
            new_d_a, new_d_b = s @ d_a, d_b @ torch.linalg.inv(s)
            before = (m_a * d_a).sum(), (m_b * d_b).sum()
            after = (
                (matrix(optimizer.state[pair.a]["exp_avg"]) * new_d_a).sum(),
                (matrix(optimizer.state[pair.b]["exp_avg"]) * new_d_b).sum(),
            )
            size = m_a.norm() * d_a.norm() + m_b.norm() * d_b.norm()
            for x, y in zip(before, after, strict=True):
                assert abs(x - y) < 1e-12 * size  # measured 2e-16


def test_pairs_of_deficient_rank_are_left_alone_and_counted():
    model = adapted()
    pairs = find_pairs(model)
    with torch.no_grad():
        pairs[0].b.zero_()
        matrix(pairs[1].a)[1] = 2 * matrix(pairs[1].a)[0]
    kept = [f.detach().clone() for pair in pairs[:2] for f in (pair.a, pair.b)]
    assert balance(pairs, {}) == 2
    assert all(torch.equal(f, g) for f, g in zip(kept, (f for p in pairs[:2] for f in (p.a, p.b)), strict=True))
    assert worst_imbalance(pairs[2:]) < 1e-6
