"""Clipping by the norm of the tangent vector, over all pairs and all other parameters together."""

import pytest
import torch
from dense_steps import bases, relative, sgd_direction, tangent_part
from peft_layers import adapted, dense_run, hand_over, mixing, products, random_gradients, refactor

from lightning_rlora.adapters import find_pairs
from lightning_rlora.optim import RiemannianSGD, Riemannion

LR = 0.1


def head_of(model):
    return [p for n, p in model.named_parameters() if "modules_to_save" in n]


def step(model, gradients, head_gradients, *, threshold, momentum=0.0):
    """One step of plain gradient descent on the manifold; the other parameters take AdamW's."""
    optimizer = RiemannianSGD.for_model(model, lr=LR, momentum=momentum, max_tangent_norm=threshold, adamw_lr=1e-2)
    hand_over(find_pairs(model), gradients)
    for p, g in zip(head_of(model), head_gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    return optimizer


@pytest.fixture
def case():
    model = adapted(torch.float64)
    generator = torch.Generator().manual_seed(0)
    gradients = random_gradients(find_pairs(model), generator)
    head = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in head_of(model)]
    squares = [tangent_part(*bases(x, 3), g).square().sum() for x, g in zip(products(model), gradients, strict=True)]
    whole = float(sum(squares + [g.square().sum() for g in head])) ** 0.5
    return gradients, head, whole


@pytest.mark.parametrize("share", [0.1, 0.9, 1.1, None])
@pytest.mark.parametrize("condition", [None, 100.0])
def test_clips_to_the_norm_whatever_the_factors(case, share, condition):
    gradients, head, whole = case
    model = adapted(torch.float64)
    if condition is not None:
        generator = torch.Generator().manual_seed(1)
        for pair in find_pairs(model):
            refactor(pair, mixing(3, condition, generator))
    start = products(adapted(torch.float64))
    optimizer = step(model, gradients, head, threshold=None if share is None else share * whole)
    scale = min(1.0, share or 1.0)
    expected = dense_run(
        start,
        3,
        [[scale * g for g in gradients]],
        sgd_direction,
        lr=LR,
        momentum=0.0,
        gradient_weight=1.0,
        weight_decay=0.0,
    )
    for x, d in zip(products(model), expected, strict=True):
        assert relative(x, d.x) < 1e-11  # measured 2e-14
    for p, g in zip(head_of(model), head, strict=True):
        assert relative(optimizer.state[p]["exp_avg"], 0.1 * scale * g) < 1e-12


def test_gradients_themselves_stay_as_they_are(case):
    gradients, head, whole = case
    model = adapted(torch.float64)
    step(model, gradients, head, threshold=0.1 * whole)
    assert all(torch.equal(p.grad, g) for p, g in zip(head_of(model), head, strict=True))


def test_riemannion_feels_clipping_only_through_its_momentum(case):
    """A step's length does not depend on the gradient's scale, but a clipped outlier weighs less in later steps."""
    gradients, _, _ = case
    generator = torch.Generator().manual_seed(3)
    runs = {}
    for threshold in (None, 10.0):
        model = adapted(torch.float64)
        optimizer = Riemannion.for_model(model, lr=LR, max_tangent_norm=threshold)
        pairs = find_pairs(model)
        after = []
        for factor in (1e4, 1.0):
            generator.manual_seed(3)
            hand_over(pairs, [factor * g for g in (gradients if factor > 1 else random_gradients(pairs, generator))])
            optimizer.step()
            after.append(products(model))
        runs[threshold] = after
    assert all(relative(x, y) < 1e-11 for x, y in zip(runs[None][0], runs[10.0][0], strict=True))
    assert all(relative(x, y) > 1e-2 for x, y in zip(runs[None][1], runs[10.0][1], strict=True))


def test_simulated_adam_averages_the_clipped_norms(case):
    """Clipping equals handing over smaller gradients; without a momentum their scale shows in the second step."""
    gradients, _, _ = case
    ends = []
    for clipped in (True, False):
        model = adapted(torch.float64)
        pairs = find_pairs(model)
        optimizer = RiemannianSGD.for_model(
            model, lr=LR, momentum=0.0, simulate_adam=True, max_tangent_norm=5.0 if clipped else None
        )
        for factor in (100.0, 0.01):
            scale = 1.0
            if not clipped:
                xis = [tangent_part(*bases(x, 3), factor * g) for x, g in zip(products(model), gradients, strict=True)]
                scale = min(1.0, 5.0 / float(sum(xi.square().sum() for xi in xis)) ** 0.5)
            hand_over(pairs, [scale * factor * g for g in gradients])
            optimizer.step()
        ends.append(products(model))
    assert all(relative(x, y) < 1e-11 for x, y in zip(*ends, strict=True))
