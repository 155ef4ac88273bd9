"""Rates in units of the base weights: against a group of its own for every pair, with the rate worked out by hand."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_layers import adapted, hand_over, products, random_gradients
from torch import nn

from lightning_rlora.adapters import base_size, find_pairs
from lightning_rlora.adapters.pairs import base_weight
from lightning_rlora.errors import UserError
from lightning_rlora.optim import Riemannion, WhitenedRiemannion, parameter_groups

KINDS = [Riemannion, WhitenedRiemannion]


def steps(optimizer, model, count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        hand_over(find_pairs(model), random_gradients(find_pairs(model), generator))
        optimizer.step()
    return products(model)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_steps_in_its_own_unit(kind):
    options = {"momentum": 0.7, "max_tangent_norm": 3.0}
    model = adapted(torch.float64, alpha_pattern={"conv1d": 12})
    by_hand = copy.deepcopy(model)
    got = steps(kind.for_model(model, lr=0.3, weight_decay=0.2, relative=True, **options), model, 4)
    groups = [
        {
            "params": [pair.a, pair.b],
            "scaling": pair.scaling,
            "lr": 0.3 * base_size(pair) / 6**0.5,
            "weight_decay": 0.2 / (base_size(pair) / 6**0.5),
        }
        for pair in find_pairs(by_hand)
    ]
    expected = steps(kind(groups, relative=False, **options), by_hand, 4)
    assert len({group["lr"] for group in groups}) == 5
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() < 1e-12 * other.norm()  # measured 1e-15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [2, 8])
def test_a_step_has_the_rates_share_of_the_weights_size(kind, r):
    """Also where fewer than 2r singular values fit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    model = get_peft_model(model, LoraConfig(r=r, target_modules=["0", "2"])).double()
    for pair in find_pairs(model):  # far larger than the step, so that the retraction leaves it as it is
        nn.init.normal_(pair.a), nn.init.normal_(pair.b)
    optimizer = kind.for_model(model, lr=1e-6, relative=True)
    before = products(model)
    model(torch.randn(64, 32, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    for pair, x, start in zip(find_pairs(model), products(model), before, strict=True):
        assert (x - start).norm() == pytest.approx(1e-6 * base_size(pair), rel=0.05)  # measured 0.014 below, to equal


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_keeps_its_units(kind):
    model = adapted(torch.float64)
    optimizer = kind.for_model(model, lr=0.3, relative=True)
    steps(optimizer, model, 2)
    again = copy.deepcopy(model)
    for pair in find_pairs(again):
        base_weight(pair).data.mul_(1.01)  # as an offset changes it a little
    resumed = kind.for_model(again, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, other in zip(steps(optimizer, model, 2, seed=2), steps(resumed, again, 2, seed=2), strict=True):
        assert torch.equal(one, other)


def test_sizes_are_asked_for():
    model = adapted()
    optimizer = Riemannion(parameter_groups(model), lr=0.1, relative=True)
    with pytest.raises(UserError, match="for_model"):
        steps(optimizer, model, 1)
    with pytest.raises(UserError, match="another one"):
        optimizer.measure_base(copy.deepcopy(model))
    optimizer.measure_base(model)
    steps(optimizer, model, 1)


def test_what_adamw_trains_has_no_unit():
    model = adapted()
    optimizer = Riemannion.for_model(model, lr=0.1, relative=True)
    assert [("units" in group, group["algorithm"]) for group in optimizer.param_groups] == [
        (True, "riemannion"),
        (False, "adamw"),
    ]


def test_a_rate_is_absolute_unless_it_is_said():
    model = adapted()
    twin = copy.deepcopy(model)
    for pair in find_pairs(twin):
        base_weight(pair).data.mul_(3)
    one, other = (steps(Riemannion.for_model(m, lr=0.1), m, 2) for m in (model, twin))
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_that_of_the_whitened_one_is_relative():
    assert "units" in WhitenedRiemannion.for_model(adapted()).param_groups[0]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_step_knows_the_units(kind):
    model = adapted(target_modules=["linear", "conv1d", "other_linear"])
    on_gpu = copy.deepcopy(model).cuda()
    options = {"lr": 0.3, "weight_decay": 0.2, "momentum": 0.7, "relative": True}
    optimizer = kind.for_model(on_gpu, **options)
    expected = steps(kind.for_model(model, **options), model, 4)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        hand_over(find_pairs(on_gpu), [g.cuda() for g in random_gradients(find_pairs(on_gpu), generator)])
        optimizer.step()
    assert optimizer._graphed is not None
    for one, other in zip(products(on_gpu), expected, strict=True):
        assert (one.cpu() - other).norm() < 1e-4 * other.norm()
