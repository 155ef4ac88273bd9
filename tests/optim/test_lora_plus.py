"""LoRA+'s groups are the authors' rule, as PEFT's helper has it, with a weight decay that applies."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lightning_rlora.adapters import find_pairs
from lightning_rlora.errors import UserError
from lightning_rlora.optim import LoRARITE, Riemannion, lora_plus, lora_plus_groups, parameter_groups

LR, RATIO, EMBEDDING_LR = 1e-3, 16.0, 1e-6


class Network(nn.Module):
    """An embedding, a linear layer and a convolution to adapt; a norm and a head that train as they are."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 12)
        self.convolution = nn.Conv1d(1, 6, 3, padding=1)
        self.norm = norm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, tokens):
        x = self.linear(self.embedding(tokens).mean(1))
        return self.head(self.norm(x + self.convolution(x.unsqueeze(1)).mean(1)))


def adapted(norm=nn.LayerNorm, **fields):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": ["embedding", "linear", "convolution"], "modules_to_save": ["norm", "head"]}
    model = get_peft_model(Network(norm), LoraConfig(**(settings | {"bias": "lora_only"} | fields)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def rates_and_decays(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize("dora", [False, True])
def test_the_groups_are_the_authors_rule(dora):
    model = adapted(use_dora=dora)
    ours = torch.optim.AdamW(lora_plus_groups(model, LR, RATIO), weight_decay=0.1)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, loraplus_weight_decay=0.1
    )
    found = rates_and_decays(model, ours)
    assert found == rates_and_decays(model, theirs)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_rule_by_hand():
    model = adapted(norm=nn.RMSNorm)
    found = rates_and_decays(model, torch.optim.AdamW(lora_plus_groups(model, LR, RATIO), weight_decay=0.1))
    expected = {
        "embedding.lora_embedding_A.default": (EMBEDDING_LR, 0.1),
        "embedding.lora_embedding_B.default": (EMBEDDING_LR, 0.1),
        "linear.lora_A.default.weight": (LR, 0.1),
        "linear.lora_B.default.weight": (RATIO * LR, 0.1),
        "linear.base_layer.bias": (RATIO * LR, 0.0),
        "convolution.lora_A.default.weight": (LR, 0.1),
        "convolution.lora_B.default.weight": (RATIO * LR, 0.1),
        "convolution.base_layer.bias": (RATIO * LR, 0.0),
        "norm.modules_to_save.default.weight": (RATIO * LR, 0.0),  # PEFT's helper would decay an RMSNorm
        "head.modules_to_save.default.weight": (LR, 0.1),
        "head.modules_to_save.default.bias": (RATIO * LR, 0.0),
    }
    assert {name.removeprefix("base_model.model."): value for name, value in found.items()} == expected


def test_weight_decay_shrinks_the_right_parameters():
    """With zero gradients AdamW only decays: by 1 - lr x decay a step, at each group's own rate."""
    model = adapted()
    optimizer = torch.optim.AdamW(lora_plus_groups(model, LR, RATIO, embedding_lr=1e-2), weight_decay=0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name not in before:
            continue
        rate = 1e-2 if "embedding" in name else RATIO * LR if "lora_B" in name else LR
        decay = 0.0 if "bias" in name or "norm" in name else 0.5
        torch.testing.assert_close(parameter, before[name] * (1 - rate * decay), rtol=1e-6, atol=0)
    # what this guards against: the helper takes a plain weight_decay and drops it
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=RATIO, weight_decay=0.5)
    assert {group["weight_decay"] for group in theirs.param_groups} == {0.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=LR, weight_decay=0.1),
        lambda groups: torch.optim.SGD(groups, lr=LR, momentum=0.9),
        lambda groups: torch.optim.Adafactor(groups, lr=LR),
        lambda groups: torch.optim.RMSprop(groups, lr=LR),
    ],
    ids=["AdamW", "SGD", "Adafactor", "RMSprop"],
)
def test_any_optimizer_takes_the_rates_and_lowers_the_loss(make):
    model = adapted()
    optimizer = lora_plus(model, make, RATIO)
    assert {group["lr"] for group in optimizer.param_groups} == {LR, EMBEDDING_LR, RATIO * LR}
    tokens = torch.randint(0, 20, (16, 5), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), tokens[:, 0] % 3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_a_ratio_of_one_is_the_plain_optimizer():
    """Without embeddings, norms and biases, whose rates and decay are LoRA+'s own."""
    settings = {"target_modules": ["linear", "convolution"], "modules_to_save": None, "bias": "none"}
    ends = []
    for make in (
        lambda m: torch.optim.AdamW(parameter_groups(m), lr=LR),
        lambda m: torch.optim.AdamW(lora_plus_groups(m, LR, 1)),
    ):
        model = adapted(**settings)
        optimizer = make(model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.arange(20).view(4, 5)).square().mean().backward()
            optimizer.step()
        ends.append([p.detach() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_one_optimizer_of_the_groups_by_hand_and_no_warning():
    """A padded embedding is no point of the manifold, which is nothing to LoRA+."""
    model = adapted()
    model.base_model.model.embedding.base_layer.padding_idx = 0
    with pytest.warns(UserWarning, match="are left to AdamW"):
        parameter_groups(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = lora_plus(model, lambda groups: torch.optim.AdamW(groups, lr=LR, weight_decay=0.1), RATIO)
    expected = torch.optim.AdamW(lora_plus_groups(model, LR, RATIO), lr=LR, weight_decay=0.1)
    for group, other in zip(ours.param_groups, expected.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in other["params"]]
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}


@pytest.mark.parametrize("kind", [Riemannion, LoRARITE])
def test_optimizers_of_pairs_are_refused_and_factors_untouched(kind):
    model = adapted(target_modules=["linear"])
    pairs = find_pairs(model)
    for pair in pairs:
        nn.init.zeros_(pair.b)
    with pytest.raises(UserError, match=rf"{kind.__name__} moves A and B together.*lr_ratio"):
        lora_plus(model, lambda groups: kind(groups, lr=0.1))
    assert pairs and not any(pair.b.any() for pair in pairs)  # Riemannion would have given B a start


def test_what_is_refused():
    model = adapted()
    with pytest.raises(UserError, match="positive ratio"):
        lora_plus_groups(model, LR, 0.0)
    with pytest.raises(UserError, match="nothing to train"):
        lora_plus_groups(model.requires_grad_(False), LR)
