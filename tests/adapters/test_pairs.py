"""Which factors are found as pairs, and what is left out with which sentence."""

import pytest
import torch
from adapted_models import KINDS, gpt2, llama, one_layer, randomise, unet
from peft import AdaLoraConfig, LoraConfig, VeraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from torch import nn

from lightning_rlora.adapters import find_pairs, matrix, scan
from lightning_rlora.adapters.pairs import base_weight, is_quantised, is_transposed
from lightning_rlora.errors import UserError


def check_against_peft(model, adapter="default"):
    """The pairs are the factors in PEFT's own state dict, and their products PEFT's delta weights."""
    pairs = find_pairs(model)
    factors = {key for key in get_peft_model_state_dict(model, save_embedding_layers=False) if "magnitude" not in key}
    factors = {key for key in factors if ".lora_" in key}
    found = {pair.name for pair in pairs}
    assert {key.split(".lora_")[0] for key in factors} == found
    assert len(factors) == 2 * len(pairs)
    for pair in pairs:
        delta = pair.layer.get_delta_weight(adapter)
        product = pair.scaling * matrix(pair.b) @ matrix(pair.a)
        product = (product.mT if is_transposed(pair) else product).reshape(base_weight(pair).shape)
        assert torch.allclose(product, delta.reshape(product.shape), rtol=1e-5, atol=1e-6)
        m, n, r = pair.shape
        assert m * n == base_weight(pair).numel()
        assert r == pair.layer.r[adapter]
    return pairs


@pytest.mark.parametrize("kind", KINDS)
def test_layer_kinds(kind):
    case = one_layer(kind, dtype=torch.float32)
    (pair,) = find_pairs(case.model)
    assert pair.name == "layer"
    assert pair.scaling == 5 / 3
    assert scan(case.model).others == {}
    product = (pair.scaling * matrix(pair.b) @ matrix(pair.a)).detach()
    delta = case.as_matrix(case.peft_layer.get_delta_weight("default").detach())
    assert torch.allclose(product, delta, rtol=1e-5, atol=1e-6)


def test_patterns_rslora_and_all_linear():
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 5},
        alpha_pattern={"k_proj": 10},
        lora_dropout=0.1,
    )
    model = randomise(get_peft_model(llama(), config))
    pairs = {pair.name.removeprefix("base_model.model.model."): pair for pair in check_against_peft(model)}
    assert len(pairs) == 14  # 7 projections of 2 layers, without the head
    assert pairs["layers.0.self_attn.q_proj"].shape == (16, 16, 2)
    assert pairs["layers.0.mlp.up_proj"].shape == (24, 16, 3)
    assert pairs["layers.1.mlp.up_proj"].shape == (24, 16, 5)
    assert pairs["layers.0.self_attn.k_proj"].scaling == pytest.approx(10 / 3**0.5)
    assert pairs["layers.0.self_attn.q_proj"].scaling == pytest.approx(6 / 2**0.5)


def test_order_is_that_of_the_modules():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, _ in model.named_modules()]
    places = [names.index(pair.name) for pair in find_pairs(model)]
    assert places == sorted(places)


def test_gpt2_with_embeddings_and_head():
    model = get_peft_model(gpt2(), LoraConfig(r=2, target_modules=["c_attn", "c_fc", "wte", "lm_head"]))
    assert len(check_against_peft(randomise(model))) == 4


def test_injected_models_and_models_inside_modules():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), llama())
    names = [pair.name for pair in find_pairs(model)]
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    outer = nn.ModuleDict({"inner": model, "head": nn.Linear(2, 2)})
    found = scan(outer)
    assert [pair.name for pair in found.pairs] == [f"inner.{name}" for name in names]
    assert set(found.others) == {"head.weight", "head.bias"}


def test_unet_of_diffusers():
    model = unet()
    targets = ["to_q", "to_out.0", "conv1", "time_emb_proj", "proj_out"]
    expected = [n for n, m in model.named_modules() if any(n.endswith(f".{t}") for t in targets)]
    model.add_adapter(LoraConfig(r=2, target_modules=targets))
    found = scan(randomise(model))
    assert sorted(pair.name for pair in found.pairs) == sorted(expected)
    assert {pair.b.ndim for pair in found.pairs} == {2, 4}
    assert not found.others
    check_against_peft(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers(quantised_llama, bits):
    model = get_peft_model(quantised_llama(bits), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    pairs = find_pairs(model)
    assert [pair.shape for pair in pairs] == [(64, 64, 2), (32, 64, 2)] * 2
    assert all(is_quantised(pair) for pair in pairs)
    assert all(pair.a.dtype == torch.float32 for pair in pairs)
    assert not any(is_quantised(pair) for pair in find_pairs(one_layer("Linear").model))


def test_only_the_trainable_adapter_counts():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    assert {(pair.adapter, pair.shape[2]) for pair in find_pairs(model)} == {("default", 2)}
    model.set_adapter("second")
    assert {(pair.adapter, pair.shape[2]) for pair in find_pairs(model)} == {("second", 3)}
    assert len(find_pairs(model)) == 4
    assert not scan(model).others
    model.base_model.set_adapter(["default", "second"])
    assert len(find_pairs(model)) == 6


def test_what_trains_besides_the_pairs():
    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"], bias="all")
    )
    found = scan(model)
    assert len(found.pairs) == 2
    kinds = sorted({name.split(".")[-2] if "magnitude" not in name else "magnitude" for name in found.others})
    assert kinds == ["default", "magnitude"]  # the head's copy and the magnitudes
    assert not found.left_out
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    pairs = {id(p) for pair in found.pairs for p in (pair.a, pair.b)}
    assert pairs.isdisjoint(map(id, found.others.values()))
    assert trainable == pairs | {id(p) for p in found.others.values()}


def test_trainable_tokens_are_like_a_head():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    found = scan(model)
    assert len(found.pairs) == 2
    assert len(found.others) == 1
    assert not found.left_out


def check_left_out(model, sentence, pairs=0):
    found = scan(model)
    assert len(found.pairs) == pairs
    assert found.left_out
    assert all(sentence in reason for reason in found.left_out.values())
    assert found.left_out.keys() <= found.others.keys()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.others.keys() <= trainable
    if not pairs:
        with pytest.raises(UserError, match="no LoRA pair") as error:
            find_pairs(model)
        assert sentence in str(error.value)
        assert "\n" not in str(error.value)


def test_one_frozen_factor_is_left_out():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "q_proj.lora_A" in name:
            parameter.requires_grad_(False)
    check_left_out(model, "one of its two factors is frozen", pairs=2)
    assert len(scan(model).left_out) == 2


def test_shared_factors_are_left_out():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    first, second = (layer.self_attn.q_proj for layer in model.base_model.model.model.layers)
    second.lora_A["default"] = first.lora_A["default"]
    check_left_out(model, "shared with another layer", pairs=2)


def test_tied_adapters_over_one_storage_are_left_out():
    config = LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(llama(tie=True), config)
    layers = [m for m in model.modules() if getattr(m, "lora_embedding_B", None)]
    assert layers
    check_left_out(model, "shared with another layer", pairs=2)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "grouped convolution"),
        (nn.Conv2d(4, 6, 3, padding="same", dilation=2), "padding_mode and dilation"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "padding_mode and dilation"),
        (nn.Embedding(5, 4, padding_idx=0), "padding_idx"),
        (nn.Embedding(5, 4, sparse=True), "sparse gradients"),
    ],
    ids=["groups", "dilation", "padding_mode", "padding_idx", "sparse"],
)
def test_layers_that_are_no_plain_product_are_left_out(layer, sentence):
    model = nn.ModuleDict({"odd": layer, "plain": nn.Linear(4, 4)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["odd", "plain"]), model)
    check_left_out(model, sentence, pairs=1)


def test_multihead_attention_is_left_out_since_peft_counts_its_output_projection_twice():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    x = torch.randn(2, 3, 8).double()
    model = nn.ModuleDict({"attention": attention})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False), model)
    model.double()
    check_left_out(model, "MultiheadAttention's output projection twice")
    # why: PEFT's forward is that of W + 2 c B A in out_proj
    layer = model["attention"]
    plain = nn.MultiheadAttention(8, 2, batch_first=True).double()
    plain.load_state_dict(
        {
            "in_proj_weight": layer.in_proj_weight + layer.get_delta_weight("default"),
            "in_proj_bias": layer.in_proj_bias,
            "out_proj.weight": layer.out_proj.weight + 2 * layer.base_layer.out_proj.get_delta_weight("default"),
            "out_proj.bias": layer.out_proj.bias,
        }
    )
    assert torch.allclose(layer(x, x, x)[0], plain(x, x, x)[0], rtol=1e-10)


@pytest.mark.parametrize(
    "config",
    [
        VeraConfig(r=2, target_modules=["q_proj"]),
        AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["q_proj"]),
    ],
    ids=["VeRA", "AdaLoRA"],
)
def test_other_peft_methods_are_left_out(config):
    model = get_peft_model(llama(), config)
    check_left_out(model, "another PEFT method than LoRA")
    found = scan(model)
    assert found.left_out.keys() == found.others.keys()


def test_lora_variants_are_left_out():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[1]))
    check_left_out(model, "ALoraLinearVariant is more than a product")


def test_target_parameters_are_left_out():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]))
    check_left_out(model, "target_parameters")


def test_scaling_must_be_positive():
    model = get_peft_model(llama(), LoraConfig(r=2, lora_alpha=-2, target_modules=["q_proj"]))
    check_left_out(model, "not positive")


def test_a_rank_that_no_matrix_has_is_refused():
    model = get_peft_model(llama(), LoraConfig(r=9, target_modules=["k_proj"]))
    with pytest.raises(UserError, match=r"rank 9 .* exceeds min\(m, n\) = 8 of layer .*k_proj.*rank_pattern"):
        scan(model)


@pytest.mark.parametrize("adapted", [False, True])
def test_nothing_trainable_says_what_to_do(adapted):
    model = llama()
    if adapted:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.requires_grad_(False)
    with pytest.raises(UserError, match=r"no trainable LoRA pair.*is_trainable=True"):
        find_pairs(model)
