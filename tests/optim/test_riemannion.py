"""Riemannion on PEFT's layers against the dense float64 computation of Eq. 10 to 12 (arXiv 2507.12142)."""

import pytest
import torch
from dense_steps import relative, riemannion_direction
from peft_layers import adapted, dense_run, hand_over, mixing, products, random_gradients, refactor, worst_error
from torch import nn

from lightning_rlora.adapters import find_pairs, get_offset, matrix
from lightning_rlora.geometry import random_point
from lightning_rlora.optim import Riemannion, WhitenedRiemannion

STEPS = 200
LR, MOMENTUM, DECAY = 0.02, 0.9, 0.1
DTYPES = [pytest.param(torch.float64, id="float64"), pytest.param(torch.float32, id="float32")]
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4}


def the_gradients(model, steps=STEPS):
    """A drift and noise of the same size, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    pairs = find_pairs(model)
    drift = random_gradients(pairs, generator)
    return [[d + g for d, g in zip(drift, random_gradients(pairs, generator), strict=True)] for _ in range(steps)]


def run(model, gradients, *, scale=1.0, before_step=lambda step, pairs: None, optimizer=None):
    optimizer = optimizer or Riemannion.for_model(model, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    pairs = find_pairs(model)
    for number, step in enumerate(gradients):
        before_step(number, pairs)
        hand_over(pairs, [scale * g for g in step])
        optimizer.step()
    return optimizer


@pytest.fixture(scope="module", params=DTYPES)
def case(request):
    """The dtype, the gradients and the oracle's products after all steps."""
    dtype = request.param
    model = adapted(dtype)
    gradients = the_gradients(model)
    expected = dense_run(
        products(model),
        3,
        gradients,
        riemannion_direction(dtype),
        lr=LR,
        momentum=MOMENTUM,
        gradient_weight=1.0,
        weight_decay=DECAY,
    )
    return dtype, gradients, expected


def check(model, case, what):
    dtype, _, expected = case
    error = worst_error(products(model), expected)
    print(f"\n{what}, {dtype}: {error:.1e}")
    assert error <= ALLOWED[dtype]


# Measured, the worst of the layers, float64 / float32: 7e-14 / 1.3e-6; with factors mixed at cond 1e3 9e-14 / 1.6e-5,
# since float32 rounds the mixed factors themselves by eps * cond.
def test_follows_the_dense_iteration(case):
    model = adapted(case[0])
    start = products(model)
    run(model, case[1])
    check(model, case, "plain")
    assert min(relative(x, y) for x, y in zip(products(model), start, strict=True)) > 0.5  # it has gone somewhere


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_does_not_depend_on_how_the_start_is_factored(case, condition):
    model = adapted(case[0])
    generator = torch.Generator().manual_seed(2)
    for pair in find_pairs(model):
        refactor(pair, mixing(3, condition, generator))
    run(model, case[1])
    check(model, case, f"start refactored, cond {condition:g}")


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_carries_its_momentum_through_a_refactoring(case, condition):
    generator = torch.Generator().manual_seed(3)

    def in_the_middle(step, pairs):
        if step == 100:
            for pair in pairs:
                refactor(pair, mixing(3, condition, generator))

    model = adapted(case[0])
    run(model, case[1], before_step=in_the_middle)
    check(model, case, f"refactored at step 100, cond {condition:g}")


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_does_not_depend_on_the_gradients_scale(case, scale):
    model = adapted(case[0])
    run(model, case[1], scale=scale)
    check(model, case, f"gradients times {scale:g}")


def test_a_change_to_another_product_forgets_that_momentum_and_no_other():
    """One pair gets other factors at step 5; pair 4, of the same shape and so in the same batch, does not."""
    dtype = torch.float64
    point = random_point(16, 12, 3, generator=torch.Generator().manual_seed(9), dtype=dtype)

    @torch.no_grad()
    def in_the_middle(step, pairs):
        if step == 5:
            pairs[2].b.copy_(point.u)
            pairs[2].a.copy_(point.v.mT)

    model = adapted(dtype)
    assert find_pairs(model)[2].shape == find_pairs(model)[4].shape == (16, 12, 3)
    gradients = the_gradients(model, steps=10)
    started = []
    untouched = adapted(dtype)
    run(untouched, gradients)
    run(model, gradients, before_step=lambda step, pairs: (in_the_middle(step, pairs), started.append(products(model))))
    options = {"lr": LR, "momentum": MOMENTUM, "gradient_weight": 1.0, "weight_decay": DECAY}
    fresh = dense_run(started[5], 3, gradients[5:], riemannion_direction(dtype), **options)
    for i, (got, other) in enumerate(zip(products(model), products(untouched), strict=True)):
        if i == 2:
            assert relative(got, fresh[i].x) < 1e-11  # measured 2e-15
            assert relative(got, other) > 1e-2
        else:
            assert relative(got, other) < 1e-13  # measured 0
            assert relative(got, fresh[i].x) > 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_tied_singular_values_and_a_rotation(dtype, sparse):
    """As after locally optimal initialisation: with all singular values equal no basis is better than another.

    With lr = 0 the momentum builds up while the ties stay; the rotated factors are balanced, too. `sparse` leaves most
    rows of both bases zero, as in an embedding started from the gradients of a few tokens.
    """

    def finish(rotate):
        generator = torch.Generator().manual_seed(4)
        model = adapted(dtype)
        pairs = find_pairs(model)
        seen = {}
        for pair in pairs:
            m, n, r = pair.shape
            rows, columns = (torch.randperm(k, generator=generator)[: 7 if sparse else k] for k in (m, n))
            seen[id(pair)] = rows, columns
            point = random_point(len(rows), len(columns), r, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                pair.b.zero_(), pair.a.zero_()
                matrix(pair.b)[rows] = 0.3 * point.u.to(dtype)
                matrix(pair.a)[:, columns] = 0.3 * point.v.mT.to(dtype)
        optimizer = Riemannion.for_model(model, lr=0.0, momentum=MOMENTUM)

        def gradients():
            made = random_gradients(pairs, generator)
            for pair, g in zip(pairs, made, strict=True):
                rows, columns = seen[id(pair)]
                kept = torch.zeros_like(g)
                kept[rows.unsqueeze(1), columns] = 1
                g *= kept
            return made

        run(model, [gradients() for _ in range(3)], optimizer=optimizer)
        turns = [mixing(3, 1.0, generator) for _ in pairs]
        if rotate:
            for pair, turn in zip(pairs, turns, strict=True):
                refactor(pair, turn)
        for group in optimizer.param_groups:
            group["lr"] = LR
        run(model, [gradients() for _ in range(5)], optimizer=optimizer)
        return products(model)

    error = max(relative(x, y) for x, y in zip(finish(True), finish(False), strict=True))
    print(f"\ntied, {dtype}: {error:.1e}")
    assert error <= {torch.float64: 1e-11, torch.float32: 1e-5}[dtype]  # measured 4e-15, 4e-7


def test_the_state_is_half_of_adamws():
    model = adapted()
    optimizer = run(model, the_gradients(model, steps=1))
    for pair in find_pairs(model):
        m, n, r = pair.shape
        numbers = sum(t.numel() for f in (pair.a, pair.b) for t in optimizer.state[f].values())
        assert numbers <= (m + n) * r + 2 * r * (r + 8)
        assert {t.dtype for f in (pair.a, pair.b) for t in optimizer.state[f].values()} == {torch.float32}


def test_peft_default_start_is_put_on_the_manifold_without_a_change():
    """PEFT's B = 0 is no point: the tiny start changes the product by 1e-6 at most, and the first steps are finite."""
    from peft import LoraConfig, get_peft_model
    from peft_layers import Layers

    torch.manual_seed(0)
    base = Layers()
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["linear", "conv1d", "embedding", "convolution"]))
    tokens = torch.randint(0, 30, (4, 7))
    before = model(tokens)
    optimizer = Riemannion.for_model(model, lr=LR)
    assert (model(tokens) - before).abs().max() < 1e-5
    for x in products(model):
        s = torch.linalg.svdvals(x)
        assert (s[:3] - 1e-6).abs().max() < 1e-9 and s[3] < 1e-12
    for pair in find_pairs(model):
        assert get_offset(pair) is None
    model(tokens).square().mean().backward()
    optimizer.step()
    for x in products(model):
        # an orthogonal matrix without its (2, 2) block: singular values up to (1 + sqrt 5) / 2 of the step
        assert 0.5 * LR < torch.linalg.svdvals(x)[0] < 1.62 * LR


@pytest.mark.parametrize("kind", [Riemannion, WhitenedRiemannion])
def test_a_momentum_may_sink_below_what_float32_can_invert(kind):
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.Parameter(torch.randn(s, generator=generator) / 5) for s in ((4, 30), (40, 4)))
    optimizer = kind([{"params": [a, b], "scaling": 2.0}], lr=1e-3, momentum=0.05, relative=False)
    a.grad, b.grad = (torch.randn(p.shape, generator=generator) for p in (a, b))
    for _ in range(50):
        optimizer.step()
        a.grad.zero_(), b.grad.zero_()
    assert a.isfinite().all() and b.isfinite().all()
    assert max(float(optimizer.state[p]["momentum"].abs().max()) for p in (a, b)) < 1e-37
