"""What goes on the manifold, what goes to AdamW and why, and groups that are refused."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_layers import Layers, adapted, hand_over, products, random_gradients
from torch import nn

from lightning_rlora.adapters import find_pairs
from lightning_rlora.errors import UserError
from lightning_rlora.optim import LoRAMuon, RiemannianSGD, Riemannion, parameter_groups


def test_pairs_come_by_scaling_and_the_rest_goes_to_adamw():
    model = adapted(alpha_pattern={"conv1d": 12})
    groups = parameter_groups(model)
    assert [group.get("scaling") for group in groups] == [2.0, 4.0, None]
    pairs = find_pairs(model)
    expected = [f for pair in pairs if pair.scaling == 2.0 for f in (pair.a, pair.b)]
    assert [id(p) for p in groups[0]["params"]] == [id(f) for f in expected]
    assert groups[2]["algorithm"] == "adamw"
    trained = {id(p) for group in groups for p in group["params"]}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad}
    head = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    assert {id(p) for p in groups[2]["params"]} == {id(p) for p in head}


def test_torch_optimizers_take_the_groups():
    model = adapted()
    for pair in find_pairs(model):
        pair.a.grad, pair.b.grad = torch.ones_like(pair.a), torch.ones_like(pair.b)
    before = products(model)
    torch.optim.AdamW(parameter_groups(model), lr=0.1).step()
    assert all((x - y).norm() > 0.01 for x, y in zip(products(model), before, strict=True))


def test_lora_factors_that_are_no_point_are_left_to_adamw_with_the_reason():
    torch.manual_seed(0)

    class WithPadding(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(30, 12, padding_idx=0)
            self.linear = nn.Linear(12, 16)

    model = get_peft_model(WithPadding(), LoraConfig(r=2, target_modules=["embedding", "linear"]))
    with pytest.warns(UserWarning, match=r"2 LoRA factors are left to AdamW .*padding_idx"):
        optimizer = Riemannion.for_model(model, lr=0.1, adamw_lr=3e-4)
    assert [len(g["params"]) for g in optimizer.param_groups] == [2, 2]
    assert optimizer.param_groups[1]["algorithm"] == "adamw"
    assert optimizer.param_groups[1]["lr"] == 3e-4


def test_nothing_to_train():
    with pytest.raises(UserError, match="nothing to train"):
        parameter_groups(nn.Linear(3, 3).requires_grad_(False))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_group_is_torchs_adamw_to_the_bit(weight_decay):
    """Pairs and a head in one object; the head moves as under torch.optim.AdamW."""
    model, twin = adapted(), adapted()
    heads = [[p for n, p in m.named_parameters() if "modules_to_save" in n] for m in (model, twin)]
    options = {"betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": weight_decay}
    ours = Riemannion(
        [parameter_groups(model)[0], {"params": heads[0], "algorithm": "adamw", "lr": 3e-3, **options}], lr=0.01
    )
    theirs = torch.optim.AdamW(heads[1], lr=3e-3, **options)
    generator = torch.Generator().manual_seed(0)
    for step in range(20):
        for one, other in zip(*heads, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        if step % 3 == 0:
            heads[0][0].grad = heads[1][0].grad = None
        hand_over(find_pairs(model), random_gradients(find_pairs(model), generator))
        ours.step()
        theirs.step()
    for one, other in zip(*heads, strict=True):
        assert torch.equal(one, other)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(ours.state[one][name], theirs.state[other][name])


def test_both_algorithms_side_by_side():
    """A group may ask for the other algorithm; it then moves as in an optimizer of its own."""
    generator = torch.Generator().manual_seed(0)
    mixed, muon, sgd = adapted(), adapted(), adapted()
    groups = parameter_groups(mixed)[0]["params"]
    ours = Riemannion(
        [
            {"params": groups[:4], "scaling": 2.0},
            {"params": groups[4:], "scaling": 2.0, "algorithm": "sgd", "lr": 0.3, "simulate_adam": False},
        ],
        lr=0.02,
    )
    others = Riemannion.for_model(muon, lr=0.02), RiemannianSGD.for_model(sgd, lr=0.3)
    for _ in range(4):
        gradients = random_gradients(find_pairs(mixed), generator)
        for model, optimizer in zip((mixed, muon, sgd), (ours, *others), strict=True):
            hand_over(find_pairs(model), gradients)
            optimizer.step()
    for i, x in enumerate(products(mixed)):
        assert (x - products(muon if i < 2 else sgd)[i]).norm() < 1e-5 * x.norm()  # measured 2e-7


def test_groups_by_hand_and_added_later():
    generator = torch.Generator().manual_seed(0)
    a, b = nn.Parameter(torch.randn(2, 7, generator=generator)), nn.Parameter(torch.zeros(9, 2))
    optimizer = Riemannion([a, b], lr=0.1)  # plain parameters are pairs, too
    assert b.any()  # a start on the manifold
    bias = nn.Parameter(torch.zeros(9))
    optimizer.add_param_group({"params": [bias], "algorithm": "adamw"})
    a2, b2 = nn.Parameter(torch.randn(2, 7, generator=generator)), nn.Parameter(torch.zeros(9, 2))
    optimizer.add_param_group({"params": iter([a2, b2]), "scaling": 0.5, "lr": 0.2})
    assert b2.any()
    for factor in (a, b, a2, b2, bias):
        factor.grad = torch.randn(factor.shape, generator=generator)
    before = [p.detach().clone() for p in (a, b, a2, b2, bias)]
    optimizer.step()
    assert all(not torch.equal(p, q) for p, q in zip((a, b, a2, b2, bias), before, strict=True))
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 1e-4, 0.2]


def pair(m=9, n=7, r=2, dtype=torch.float32):
    return [nn.Parameter(torch.randn(r, n).to(dtype)), nn.Parameter(torch.randn(m, r).to(dtype))]


WRONG = {
    "odd": (lambda: [{"params": pair()[:1]}], {}, "odd number"),
    "B before A": (lambda: [{"params": pair()[::-1]}], {}, r"\(9, 2\) and \(2, 7\) are no LoRA pair"),
    "vectors": (lambda: [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))], {}, "no LoRA pair"),
    "a model's parameters": (lambda: nn.Sequential(nn.Linear(4, 4)).parameters(), {}, "no LoRA pair"),
    "bfloat16": (lambda: [{"params": pair(dtype=torch.bfloat16)}], {}, "bfloat16, too coarse .* bf16-mixed"),
    "rank": (lambda: [{"params": pair(r=8)}], {}, r"rank 8 exceeds min\(m, n\) = 7"),
    "scaling": (lambda: [{"params": pair(), "scaling": 0.0}], {}, "scaling 0.0 .* positive"),
    "algorithm": (lambda: [{"params": pair(), "algorithm": "adam"}], {}, "unknown algorithm 'adam'"),
    "lr": (pair, {"lr": -0.1}, "lr = -0.1 of Riemannion must not be negative"),
    "lr nan": (pair, {"lr": float("nan")}, "lr = nan"),
    "group's lr": (lambda: [{"params": pair(), "lr": -1.0}], {}, "lr = -1.0"),
    "adamw group's lr": (lambda: [{"params": pair(), "lr": -1.0, "algorithm": "adamw"}], {}, "lr = -1.0"),
    "momentum": (pair, {"momentum": 1.0}, "momentum = 1.0 of Riemannion must be below 1"),
    "group's momentum": (lambda: [{"params": pair(), "momentum": 1.0}], {}, "momentum = 1.0"),
    "negative momentum": (pair, {"momentum": -0.1}, "momentum = -0.1"),
    "weight decay": (pair, {"weight_decay": -0.1}, "weight_decay = -0.1"),
    "AdamW's decays": (
        lambda: [{"params": pair(), "betas": (1.0, 0.999), "algorithm": "adamw"}],
        {},
        r"betas = \(1.0,",
    ),
    "one decay": (lambda: [{"params": pair(), "betas": (0.9,)}], {}, "two numbers"),
    "floor": (pair, {"min_singular_value": -1.0}, "min_singular_value = -1.0"),
    "clipping": (pair, {"max_tangent_norm": 0.0}, "max_tangent_norm = 0.0 must be positive"),
}


@pytest.mark.parametrize("make, options, message", WRONG.values(), ids=WRONG)
def test_wrong_groups_are_refused_in_one_line(make, options, message):
    with pytest.raises(UserError, match=message) as caught:
        Riemannion(make(), **options)
    assert "\n" not in str(caught.value)
    assert not re.search(r"  ", str(caught.value))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["pair", "head"])
def test_a_gradient_that_is_not_finite_changes_nothing(where, bad):
    model = adapted()
    optimizer = RiemannianSGD.for_model(model, lr=0.1, simulate_adam=True)
    pairs = find_pairs(model)
    head = next(p for n, p in model.named_parameters() if "modules_to_save" in n)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        hand_over(pairs, random_gradients(pairs, generator))
        head.grad = torch.ones_like(head)
        optimizer.step()
    parameters = [p.detach().clone() for p in model.parameters()]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in model.parameters()]
    hand_over(pairs, random_gradients(pairs, generator))
    (pairs[3].a if where == "pair" else head).grad.view(-1)[2] = bad
    with pytest.raises(UserError, match="the gradient is not finite"):
        optimizer.step()
    for p, old, old_state in zip(model.parameters(), parameters, states, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in old_state.items())


def test_layers_forward_trains():
    """The whole thing once through autograd: a few steps lower a loss."""
    torch.manual_seed(0)
    model = get_peft_model(
        Layers(),
        LoraConfig(r=3, target_modules=["embedding", "convolution", "linear", "conv1d"], modules_to_save=["head"]),
    )
    optimizer = Riemannion.for_model(model, lr=0.02, adamw_lr=1e-2)
    tokens, target = torch.randint(0, 30, (8, 7)), torch.randn(8, 7, 3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(tokens) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"\nloss {losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.6 * losses[0]  # measured 0.54


@pytest.mark.parametrize("optimizer", [Riemannion, LoRAMuon])
def test_a_model_that_nobody_adapted_is_refused(optimizer):
    with pytest.raises(UserError, match="no LoRA pairs to train: adapt it first"):
        optimizer.for_model(torch.nn.Linear(3, 4))
