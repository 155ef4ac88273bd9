"""Starts: what the factors are, against dense decompositions; the base keeps every bit."""

import copy

import pytest
import torch
from adapted_models import gpt2, llama
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_rlora.adapters import (
    EVA,
    CorDA,
    LoftQ,
    LoRAGA,
    OLoRA,
    Passes,
    PiSSA,
    Stiefel,
    adapt,
    adapter_config,
    find_pairs,
    matrix,
)
from lightning_rlora.adapters.pairs import base_weight, is_transposed
from lightning_rlora.errors import UserError

R, SCALING = 3, 5 / 3
IDS = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids} for ids in IDS.split(2)]


def adapted(base=None, targets=("q_proj", "down_proj"), **fields):
    base = llama() if base is None else base
    torch.manual_seed(0)
    settings = {"r": R, "lora_alpha": 5, "target_modules": list(targets), "lora_dropout": 0.5}
    return get_peft_model(base, LoraConfig(**(settings | fields))).eval()


def started(start, model):
    """The pairs after the start, with the base as it was to the last bit, and factors where they were in memory."""
    pairs = find_pairs(model)
    before = [base_weight(pair).detach().clone() for pair in pairs]
    places = [x.data_ptr() for pair in pairs for x in (pair.a, pair.b, base_weight(pair))]

    def forward(batch):
        with torch.no_grad():
            return model(**batch)

    passes = Passes(BATCHES[: start.batches], forward, lambda batch: model(**batch).loss)
    start.set_factors(model, pairs, passes, torch.Generator().manual_seed(0))
    assert all(torch.equal(x, base_weight(pair)) for x, pair in zip(before, pairs, strict=True))
    assert places == [x.data_ptr() for pair in pairs for x in (pair.a, pair.b, base_weight(pair))]
    assert not model.training
    assert all(base_weight(pair).grad is None and not base_weight(pair).requires_grad for pair in pairs)
    return pairs


def product(pair):
    return pair.scaling * matrix(pair.b).detach().double() @ matrix(pair.a).detach().double()


def weight(pair):
    found = base_weight(pair).detach().double()
    return found.mT if is_transposed(pair) else found


def best(dense, r=R):
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    return u[:, :r] * s[:r] @ vt[:r]


def relative(x, y):
    return float((x - y).norm() / y.norm())


def in_span(vectors, space):
    """How much of unit columns lies in the span of orthonormal columns: 1 for all of it, in the worst column."""
    return float((space.mT @ nn.functional.normalize(vectors.detach().double(), dim=0)).norm(dim=0).min())


def conv1d():
    return adapted(gpt2(), ("c_attn", "c_proj"), fan_in_fan_out=True)


@pytest.mark.parametrize("make", [adapted, conv1d])
def test_pissa_is_the_best_part_of_the_base(make):
    for pair in started(PiSSA(), make()):
        assert relative(product(pair), best(weight(pair))) < 1e-5  # measured 3e-6


def test_fast_pissa_leaves_hardly_more():
    for pair in started(PiSSA(niter=16), adapted()):
        rest = weight(pair) - product(pair)
        assert (print(rest.norm() / (weight(pair) - best(weight(pair))).norm())) or rest.norm() < 1.05 * (
            weight(pair) - best(weight(pair))
        ).norm()  # measured 1.002


def test_olora_is_the_first_part_of_the_qr_factorisation():
    for pair in started(OLoRA(), adapted()):
        q, r = torch.linalg.qr(weight(pair))
        assert relative(product(pair), SCALING * q[:, :R] @ r[:R]) < 1e-5  # measured 2e-7


@pytest.mark.parametrize("factor", ["A", "B", "both"])
def test_stiefel_factors_are_orthonormal_or_zero(factor):
    eye = torch.eye(R)
    for pair in started(Stiefel(factor), adapted()):
        a, b = pair.a @ pair.a.mT, pair.b.mT @ pair.b
        torch.testing.assert_close(a, eye if factor != "B" else torch.zeros(R, R), atol=1e-5, rtol=0)
        torch.testing.assert_close(b, eye if factor != "A" else torch.zeros(R, R), atol=1e-5, rtol=0)


def test_lora_ga_takes_the_gradients_singular_vectors():
    dense = llama().train()
    for batch in BATCHES:
        dense(**batch).loss.backward()
    layers = dict(dense.named_modules())
    for pair in started(LoRAGA(batches=2), adapted()):
        gradient = layers[pair.name.removeprefix("base_model.model.")].weight.grad.double()
        u, _, vt = torch.linalg.svd(gradient)
        print(1 - in_span(pair.a.mT, vt[:R].mT))
        assert in_span(pair.a.mT, vt[:R].mT) > 0.999  # measured 1 - 1e-6: A has the first r, B the next r
        assert in_span(pair.b, u[:, R : 2 * R]) > 0.999


def inputs_of(model):
    """What each adapted layer sees of each row of all batches: name -> list of (tokens, n)."""
    seen = {pair.name: [] for pair in find_pairs(model)}

    def note(name):
        return lambda _, inputs, __: seen[name].append(inputs[0][0].double())

    bases = {pair.name: pair.layer.get_base_layer() for pair in find_pairs(model)}
    handles = [base.register_forward_hook(note(name)) for name, base in bases.items()]
    with torch.no_grad():
        for row in IDS:
            model(row[None])
    for handle in handles:
        handle.remove()
    return seen


def test_eva_takes_the_directions_of_the_inputs():
    model = adapted(copy.deepcopy(llama()))
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    seen = inputs_of(model)
    for pair in started(EVA(batches=2, tau=0.9999), model):
        assert not pair.b.any()
        torch.testing.assert_close(pair.a @ pair.a.mT, torch.eye(R), atol=1e-4, rtol=0)
        inputs = torch.cat(seen[pair.name])
        top = torch.linalg.svdvals(inputs - inputs.mean(0))[:R].square().sum()
        share = ((inputs - inputs.mean(0)) @ pair.a.detach().mT.double()).square().sum()
        print(share / top)
        assert share > 0.95 * top  # measured at least 0.99
    assert model.peft_config["default"].to_dict() == before


def test_corda_is_the_best_part_of_the_weighted_base():
    model = adapted()
    seen = inputs_of(model)
    for pair in started(CorDA(batches=2), model):
        rows = [x / x.max().abs() for x in seen[pair.name]]  # PEFT scales each sequence so
        covariance = sum(x.mT @ x for x in rows) / len(rows)
        covariance += 0.01 * covariance.diag().mean() * torch.eye(len(covariance), dtype=torch.float64)
        weighted = weight(pair) @ covariance
        assert relative(product(pair) @ covariance, best(weighted)) < 1e-3  # measured 2e-6


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_loftq_is_the_best_part_of_what_quantisation_took_away(quantization):
    pytest.importorskip("bitsandbytes")
    from peft.utils.integrations import dequantize_module_weight

    from lightning_rlora.modules.base_model import load_base

    exact, base = (
        load_base("embedded:tiny-lm", dtype="float32", quantization=q, trust_remote_code=False)
        for q in (None, quantization)
    )
    layers = dict(exact.named_modules())
    for pair in started(LoftQ(), adapted(base, ("q_proj", "down_proj"))):
        rounded = dequantize_module_weight(pair.layer.get_base_layer()).double()
        error = layers[pair.name.removeprefix("base_model.model.")].weight.detach().double() - rounded
        assert relative(product(pair), best(error)) < 1e-4  # measured 1e-5
        assert (error - product(pair)).norm() < error.norm()


REFUSED = {
    "an embedding": (PiSSA(), lambda: adapted(targets=["embed_tokens"]), "embed_tokens is not linear"),
    "OLoRA of GPT-2's layers": (OLoRA(), conv1d, "stores its weight transposed"),
    "LoftQ without quantisation": (LoftQ(), adapted, "is not quantised"),
    "EVA with several ranks": (EVA(2), lambda: adapted(rank_pattern={"q_proj": 2}), "one rank for all layers"),
    "EVA with few tokens": (EVA(2), lambda: adapted(llama(hidden=64), r=30), "at least r = 30 labelled tokens"),
}


@pytest.mark.parametrize("start, make, message", REFUSED.values(), ids=REFUSED)
def test_what_a_start_refuses(start, make, message):
    model = make()
    with pytest.raises(UserError, match=message):
        started(start, model)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "lora_ga", "eva", "corda"])
def test_pefts_own_way_is_refused_where_no_checkpoint_could_follow(name):
    with pytest.raises(UserError, match=f"init_lora_weights='{name}'.*callback AdapterInit with start"):
        adapt(llama(), adapter_config({"init_lora_weights": name, "target_modules": ["q_proj"]}))
