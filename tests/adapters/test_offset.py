"""The offset of the base: the function is unchanged, and a state dict brings any base to W - X0, once."""

import copy

import pytest
import torch
from adapted_models import IDS, KINDS, llama, one_layer, randomise
from peft import LoraConfig, get_peft_model

from lightning_rlora.adapters import find_pairs, get_offset, keep_adapter, matrix, offset_factors, track_offsets
from lightning_rlora.errors import UserError


def subtract_start(model):
    """Shift every base by the adapter's present product, as LOI does."""
    pairs = find_pairs(model)
    track_offsets(pairs)
    for pair in pairs:
        get_offset(pair).subtract(pair.scaling * matrix(pair.b), matrix(pair.a))
    return pairs


def adapted(*, seed=0, base_seed=0, tracked=True, dtype=torch.float32):
    """A Llama with a random adapter; one base_seed is one pretrained base."""
    model = get_peft_model(llama(seed=base_seed), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    randomise(model, seed=seed)
    model.to(dtype)
    if tracked:
        track_offsets(find_pairs(model))
    return model.eval()


def shifted(**kwargs):
    """The same, shifted by its start, and then trained a little."""
    model = adapted(**kwargs)
    subtract_start(model)
    return randomise(model, seed=9, std=0.05)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def bases(model):
    return [pair.layer.base_layer.weight for pair in find_pairs(model)]


def largest(x, y):
    return float((x - y).detach().abs().max() / y.detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_unchanged(kind):
    case = one_layer(kind, dtype=torch.float32)
    layer = case.peft_layer
    with torch.no_grad():
        find_pairs(case.model)[0].b.mul_(0.01 if kind == "Conv1D" else 0.1)  # the weights' own size
    weight = layer.base_layer.weight.detach().clone()
    before = layer.base_layer(case.x).detach().clone()
    delta = layer.get_delta_weight("default").detach().clone()
    (pair,) = subtract_start(case.model)
    assert largest(layer(case.x), before) < 1e-6  # W - X0 + X0 = W; measured at most 2e-7
    assert largest(layer.base_layer.weight, weight - delta) < 1e-6
    left, right = offset_factors(pair)
    assert largest(left @ right, case.as_matrix(delta)) < 1e-6
    get_offset(pair).remove()
    assert largest(layer.base_layer.weight, weight) < 1e-6
    assert offset_factors(pair) is None


def test_in_double_precision_the_shift_is_double_too():
    case = one_layer("Linear")
    before = case.peft_layer.base_layer(case.x).detach().clone()
    subtract_start(case.model)
    assert largest(case.peft_layer(case.x), before) < 1e-14


def test_an_offset_that_is_only_tracked_changes_nothing():
    model = adapted(tracked=False)
    before = logits(model)
    pairs = find_pairs(model)
    assert get_offset(pairs[0]) is None
    track_offsets(pairs)
    offset = get_offset(pairs[0])
    track_offsets(pairs)
    assert get_offset(pairs[0]) is offset
    assert not offset.is_set
    assert offset_factors(pairs[0]) is None
    assert torch.equal(logits(model), before)
    assert [p.name for p in find_pairs(model)] == [p.name for p in pairs]


def test_a_second_offset_is_refused():
    model = adapted()
    pairs = subtract_start(model)
    with pytest.raises(UserError, match="carries an offset already"):
        get_offset(pairs[0]).subtract(pairs[0].b, pairs[0].a)


def test_training_the_factors_leaves_the_offset_alone():
    model = adapted()
    pairs = find_pairs(model)
    for pair in pairs:
        get_offset(pair).subtract(matrix(pair.b), matrix(pair.a))  # the factors themselves
    before = [[factor.clone() for factor in offset_factors(pair)] for pair in pairs]
    randomise(model)
    for pair, (left, right) in zip(pairs, before, strict=True):
        assert torch.equal(offset_factors(pair)[0], left)
        assert torch.equal(offset_factors(pair)[1], right)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_take_none(quantised_llama, bits):
    model = get_peft_model(quantised_llama(bits), LoraConfig(r=2, target_modules=["q_proj"]))
    pairs = find_pairs(model)
    track_offsets(pairs)
    with pytest.raises(UserError, match="quantised and takes no offset"):
        get_offset(pairs[0]).subtract(pairs[0].b, pairs[0].a)
    state = keep_adapter(model, model.state_dict())
    again = get_peft_model(quantised_llama(bits), LoraConfig(r=2, target_modules=["q_proj"]))
    track_offsets(find_pairs(again))
    assert not again.load_state_dict(state, strict=False).unexpected_keys
    assert torch.equal(find_pairs(again)[0].a, pairs[0].a)


def test_an_offset_from_a_float_base_does_not_go_on_a_quantised_one(quantised_llama):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = randomise(get_peft_model(llama(hidden=64), config))
    subtract_start(model)
    quantised = get_peft_model(quantised_llama(4), config)
    track_offsets(find_pairs(quantised))
    with pytest.raises(UserError, match="another base model"):
        quantised.load_state_dict(keep_adapter(model, model.state_dict()), strict=False)


def test_adapter_state_goes_on_a_fresh_base():
    model = shifted()
    state = keep_adapter(model, model.state_dict())
    assert not any(key.endswith("base_layer.weight") for key in state)
    fresh = adapted(seed=5)
    assert not fresh.load_state_dict(state, strict=False).unexpected_keys
    # the same subtraction on the same numbers: bit for bit
    assert all(torch.equal(x, y) for x, y in zip(bases(fresh), bases(model), strict=True))
    assert torch.equal(logits(fresh), logits(model))


def test_the_same_offset_is_not_subtracted_twice():
    model = shifted()
    state = copy.deepcopy(keep_adapter(model, model.state_dict()))
    before, base = logits(model), [weight.clone() for weight in bases(model)]
    randomise(model, seed=3)
    for _ in range(2):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(x, y) for x, y in zip(bases(model), base, strict=True))
    assert torch.equal(logits(model), before)


def test_another_offset_is_taken_back_first():
    model, other = shifted(seed=0), shifted(seed=7)
    state = keep_adapter(model, model.state_dict())
    other.load_state_dict(state, strict=False)
    assert largest(logits(other), logits(model)) < 1e-5
    assert all(largest(x, y) < 1e-6 for x, y in zip(bases(other), bases(model), strict=True))
    other.load_state_dict(keep_adapter(adapted(seed=7), adapted(seed=7).state_dict()), strict=False)
    assert all(largest(x, y) < 1e-6 for x, y in zip(bases(other), bases(adapted()), strict=True))
    assert offset_factors(find_pairs(other)[0]) is None


@pytest.mark.parametrize("target", ["pristine", "the same", "another offset", "another base"])
def test_a_full_state_dict_holds_the_shifted_base(target):
    model = shifted()
    other = {
        "pristine": lambda: adapted(seed=5),
        "the same": lambda: copy.deepcopy(model),
        "another offset": lambda: shifted(seed=7),
        "another base": lambda: adapted(base_seed=3),
    }[target]()
    other.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(x, y) for x, y in zip(bases(other), bases(model), strict=True))
    assert torch.equal(logits(other), logits(model))
    for pair, same in zip(find_pairs(other), find_pairs(model), strict=True):
        assert torch.equal(offset_factors(pair)[0], offset_factors(same)[0])
        assert torch.equal(get_offset(pair).fingerprint, get_offset(same).fingerprint)
    # and the other's offset can still be taken back
    get_offset(find_pairs(other)[0]).remove()
    assert largest(bases(other)[0], bases(adapted())[0]) < 1e-6


def test_a_full_state_dict_without_offsets_holds_a_pristine_base():
    model, plain = shifted(), adapted(seed=5, tracked=False)
    missing = model.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert len(missing) == 3 * len(find_pairs(model))
    assert offset_factors(find_pairs(model)[0]) is None
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("make", [adapted, shifted])
@pytest.mark.parametrize("start", [adapted, shifted])
def test_another_base_is_refused_and_left_alone(make, start):
    state = keep_adapter(make(), make().state_dict())
    other = start(base_seed=3)
    base = [weight.clone() for weight in bases(other)]
    with pytest.raises(UserError, match=r"trained on another base model \(the weights of layer .*q_proj differ\)"):
        other.load_state_dict(state, strict=False)
    assert all(torch.equal(x, y) for x, y in zip(bases(other), base, strict=True))


def test_a_base_in_bfloat16_is_the_same_base():
    model = shifted()
    half = adapted(seed=5, tracked=False)
    for weight in half.base_model.model.parameters():
        if not weight.requires_grad:
            weight.data = weight.data.bfloat16()
    track_offsets(find_pairs(half))
    half.load_state_dict(keep_adapter(model, model.state_dict()), strict=False)
    for x, y in zip(bases(half), bases(model), strict=True):
        assert x.dtype == torch.bfloat16
        assert largest(x.float(), y) < 0.01  # two roundings to 8 bits
    assert torch.equal(offset_factors(find_pairs(half)[0])[0], offset_factors(find_pairs(model)[0])[0])


def test_a_model_cast_after_the_shift_is_not_shifted_again():
    model = shifted()
    state = copy.deepcopy(keep_adapter(model, model.state_dict()))
    half = copy.deepcopy(model).to(torch.bfloat16)
    base = [weight.clone() for weight in bases(half)]
    half.load_state_dict(state, strict=False)
    assert all(torch.equal(x, y) for x, y in zip(bases(half), base, strict=True))
    double = copy.deepcopy(model).to(torch.float64)
    assert offset_factors(find_pairs(double)[0])[0].dtype == torch.float64
    get_offset(find_pairs(double)[0]).remove()
    assert largest(bases(double)[0], bases(adapted())[0].double()) < 1e-6


def test_fingerprints_are_entries_from_the_whole_weight():
    model = adapted()
    pair = find_pairs(model)[0]
    fingerprint = get_offset(pair).fingerprint
    weight = bases(model)[0].flatten()
    assert fingerprint.dtype == torch.float32
    assert bool(torch.isin(fingerprint, weight).all())
    assert fingerprint[0] == weight[0]
    assert fingerprint[-1] == weight[-1]
    assert len(fingerprint.unique()) == 64


def test_a_deep_copy_shifts_its_own_base():
    model = shifted()
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    base = [weight.clone() for weight in bases(model)]
    for pair in find_pairs(twin):
        get_offset(pair).remove()
    assert all(torch.equal(x, y) for x, y in zip(bases(model), base, strict=True))
    assert largest(bases(twin)[0], bases(adapted())[0]) < 1e-6
    assert offset_factors(find_pairs(model)[0]) is not None
    state = keep_adapter(model, model.state_dict())
    twin.load_state_dict(state, strict=False)
    assert largest(logits(twin), logits(model)) < 1e-5


def test_pickling_keeps_layer_and_offset_together(tmp_path):
    torch.save(shifted(), tmp_path / "model.pt")
    model = torch.load(tmp_path / "model.pt", weights_only=False)
    for pair in find_pairs(model):
        get_offset(pair).remove()
    assert largest(bases(model)[0], bases(adapted())[0]) < 1e-6


def test_the_offset_is_no_parameter_and_stays_out_of_pefts_files(tmp_path):
    from safetensors.torch import load_file

    model = shifted()
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(find_pairs(model))
    assert not any("manifold_offset" in key for key in saved)
    assert not any("manifold_offset" in name for name, _ in model.named_parameters())
