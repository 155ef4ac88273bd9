"""Starts: what the factors are, against dense decompositions; the base keeps every bit."""

import copy
import warnings

import pytest
import torch
from adapted_models import KINDS, gpt2, llama, one_layer
from peft import LoraConfig, get_peft_model

from lightning_rlora.adapters import (
    EVA,
    CorDA,
    LoftQ,
    OLoRA,
    Passes,
    PiSSA,
    Stiefel,
    adapt,
    adapter_config,
    find_pairs,
    matrix,
    renew_magnitude,
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


def bits(pair):
    """The base weight as bytes: packed weights in a float's dtype may be no numbers, which equal nothing."""
    return base_weight(pair).detach().view(torch.uint8)


def started(start, model):
    """The pairs after the start, with the base as it was to the last bit, and factors where they were in memory."""
    pairs = find_pairs(model)
    before = [bits(pair).clone() for pair in pairs]
    places = [x.data_ptr() for pair in pairs for x in (pair.a, pair.b, base_weight(pair))]

    def forward(batch):
        with torch.no_grad():
            return model(**batch)

    passes = Passes(BATCHES[: start.batches], forward, lambda batch: model(**batch).loss)
    start.set_factors(model, pairs, passes, torch.Generator().manual_seed(0))
    assert all(torch.equal(x, bits(pair)) for x, pair in zip(before, pairs, strict=True))
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


def conv1d():
    return adapted(gpt2(), ("c_attn", "c_proj"), fan_in_fan_out=True)


@pytest.mark.parametrize("make", [adapted, conv1d])
def test_pissa_is_the_best_part_of_the_base(make):
    for pair in started(PiSSA(), make()):
        assert relative(product(pair), best(weight(pair))) < 1e-5  # measured 3e-6


def test_fast_pissa_leaves_hardly_more():
    for pair in started(PiSSA(niter=16), adapted()):
        rest, least = weight(pair) - product(pair), weight(pair) - best(weight(pair))
        assert rest.norm() < 1.01 * least.norm()  # measured 1.002


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


def test_eva_keeps_to_the_batches_of_its_own_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            # PEFT warns where it gathers the inputs of all processes
            warnings.filterwarnings("error", message=".*gather_distributed_inputs")
            started(EVA(batches=2), adapted())
    finally:
        torch.distributed.destroy_process_group()


def test_loftq_reads_the_revision_that_was_quantised(monkeypatch):
    base = quantised()
    base.config._commit_hash = "0123abc"
    asked = []
    for kind in (type(base), type(base.config)):

        def record(cls, *args, _read=kind.from_pretrained.__func__, **options):
            asked.append(options.get("revision"))
            return _read(cls, *args, **options)

        monkeypatch.setattr(kind, "from_pretrained", classmethod(record))
    started(LoftQ(), adapted(base))
    assert asked[0] == "0123abc" and set(asked) <= {"0123abc", None}
    assert asked.count("0123abc") >= 2


def test_loftq_refuses_a_base_that_is_stored_quantised(tmp_path):
    base = quantised()
    base.config.save_pretrained(tmp_path)  # with its quantization_config
    model = adapted(base)
    base.name_or_path = str(tmp_path)
    with pytest.raises(UserError, match=r"is stored quantised.*as it is loaded"):
        started(LoftQ(), model)


def quantised():
    pytest.importorskip("bitsandbytes")
    from lightning_rlora.modules.base_model import load_base

    return load_base("embedded:tiny-lm", dtype="float32", quantization="4bit", trust_remote_code=False)


@pytest.mark.parametrize("kind", KINDS)
def test_doras_magnitudes_become_the_norms_of_the_start(kind):
    case = one_layer(kind, use_dora=True)
    (pair,) = find_pairs(case.model)
    magnitude = pair.layer.lora_magnitude_vector[pair.adapter].weight
    renew_magnitude(pair)
    assert pair.layer.lora_magnitude_vector[pair.adapter].weight is magnitude and magnitude.requires_grad
    whole = case.as_matrix(base_weight(pair).detach()) + product(pair)
    torch.testing.assert_close(magnitude.detach().flatten(), whole.norm(dim=1))


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
