"""Adapting, and training a saved adapter further; wrong input is told in one line."""

import json
import shutil

import pytest
import torch
from adapted_models import IDS, llama, randomise
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import LlamaForSequenceClassification

from lightning_rlora.adapters import adapt, adapter_config, export_adapter, find_adapted, find_pairs, load_adapter, scan
from lightning_rlora.errors import UserError


def told(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 1500
    for part in parts:
        assert part in text, text


def test_a_configuration_is_pefts_own():
    config = adapter_config({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}})
    assert config == LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    assert type(adapter_config({"peft_type": "VERA"})).__name__ == "VeraConfig"


def test_a_saved_configuration_can_be_given_back():
    config = LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    assert adapter_config(config.to_dict()) == config


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rank": 4}, ["LoraConfig has no field 'rank'", "rank_pattern"]),
        ({"zzzz": 4}, ["LoraConfig has no field 'zzzz'", "lora_alpha", "r, "]),
        ({"peft_type": "LORAA"}, ["unknown peft_type 'LORAA'", "LORA"]),
        ({"peft_type": None}, ["unknown peft_type None"]),
        ({"layers_to_transform": [0], "target_modules": "q_proj"}, ["not valid", "layers_to_transform"]),
        ({"init_lora_weights": "eva", "eva_config": 3}, ["not valid"]),
    ],
    ids=str,
)
def test_wrong_configurations(fields, parts):
    with pytest.raises(UserError) as error:
        adapt(llama(), adapter_config(fields))
    told(error, *parts)


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"r": 0, "target_modules": ["q_proj"]}, "positive"),
        ({"r": -1, "target_modules": ["q_proj"]}, "positive"),
        ({"r": "8", "target_modules": ["q_proj"]}, "'str' and 'int'"),
        ({"target_modules": ["nowhere"]}, "nowhere"),
        ({"target_modules": "*"}, "nothing to repeat"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "unheard"}, "unheard"),
    ],
    ids=str,
)
def test_configurations_that_do_not_fit_the_model(fields, part):
    with pytest.raises(UserError) as error:
        adapt(llama(), adapter_config(fields))
    told(error, "the adapter does not fit the base model", part)


def test_layers_to_train_whole_that_the_base_does_not_have():
    fields = {"target_modules": "dummy-target-modules", "modules_to_save": ["to_q", "conv1"]}
    with pytest.raises(UserError) as error:
        adapt(llama(), adapter_config(fields))
    told(error, "modules_to_save names conv1, to_q", "which the base model lacks", "down_proj, ", "gate_proj, ")
    with pytest.raises(UserError) as error:  # one of two is no better
        adapt(llama(), adapter_config(fields | {"modules_to_save": ["lm_head", "scroe"]}))
    told(error, "modules_to_save names scroe, which")


def test_the_heads_that_peft_names_for_every_classifier_need_not_be_there():
    """As they stand in the configuration of an adapter that was saved."""
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    adapted = adapt(LlamaForSequenceClassification(llama().config), adapter_config(fields))
    assert any(name.endswith("score.modules_to_save.default.weight") for name, _ in adapted.named_parameters())


def test_adapters_are_float32_over_a_half_precision_base_that_is_frozen():
    model = adapt(llama().bfloat16(), adapter_config({"r": 2, "target_modules": "all-linear"}))
    pairs = find_pairs(model)
    assert len(pairs) == 14
    assert all(p.dtype == torch.float32 for pair in pairs for p in (pair.a, pair.b))
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert not scan(model).others


def test_quantised_bases_are_prepared(quantised_llama):
    model = adapt(quantised_llama(4), adapter_config({"r": 2, "target_modules": ["q_proj"]}))
    assert len(find_pairs(model)) == 2
    assert not scan(model).others
    assert model.base_model.model.model.norm.weight.dtype == torch.float32
    model(IDS).logits.sum().backward()
    assert float(find_pairs(model)[0].a.grad.norm()) == 0  # B = 0
    assert float(find_pairs(model)[0].b.grad.norm()) > 0


SAVED = {"r": 3, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture(params=[{}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}, "use_rslora": True}], ids=str)
def saved(request, tmp_path):
    """A trained model, and the folder its adapter was exported to."""
    model = randomise(adapt(llama(), adapter_config(SAVED | request.param))).eval()
    export_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_a_saved_adapter_is_trained_further(saved):
    model, folder = saved
    again = load_adapter(llama(), str(folder)).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    for found in (scan(again), scan(model)):
        assert len(found.pairs) == 4
    assert [p.name for p in find_pairs(again)] == [p.name for p in find_pairs(model)]
    assert scan(again).others.keys() == scan(model).others.keys()
    assert [p.shape for p in find_pairs(again)] == [p.shape for p in find_pairs(model)]
    again(IDS).logits.square().sum().backward()
    assert all(float(p.grad.norm()) > 0 for pair in find_pairs(again) for p in (pair.a, pair.b))


def test_an_adapter_that_peft_saved_is_loaded_too(tmp_path):
    model = randomise(adapt(llama(), adapter_config({"r": 2, "target_modules": ["q_proj", "embed_tokens"]}))).eval()
    model.save_pretrained(tmp_path)  # with the embedding's base weight
    again = load_adapter(llama(), tmp_path).eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_folder_that_is_no_adapter(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError) as error:
            load_adapter(llama(), folder)
        told(error, "holds no adapter: there is no adapter_config.json in it")


@pytest.fixture
def plain(tmp_path):
    model = adapt(llama(), adapter_config({"r": 2, "target_modules": ["q_proj"]}))
    export_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(config, **fields):
    path = config / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda f: (f / WEIGHTS).unlink(), ["has no weights", WEIGHTS]),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), ["is broken"]),
        (lambda f: (f / WEIGHTS).write_bytes(b""), ["is broken"]),
        (lambda f: (f / WEIGHTS).write_bytes(b"version https://git-lfs"), ["is broken"]),
        (lambda f: shutil.move(f / WEIGHTS, f / "adapter_model.bin"), ["adapter"]),
        (lambda f: (f / "adapter_config.json").write_text("{"), ["is broken"]),
        (lambda f: (f / "adapter_config.json").write_text("[]"), ["adapter"]),
        (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe"), ["adapter"]),
        (lambda f: edit(f, peft_type="NONE"), ["does not fit"]),
        (lambda f: edit(f, r=3), ["does not fit", "size mismatch"]),
        (lambda f: edit(f, target_modules=["q_proj", "v_proj"]), ["does not fit", "v_proj", "only one of them"]),
        (lambda f: edit(f, target_modules=["nowhere"]), ["does not fit", "nowhere"]),
    ],
    ids=[
        "no weights",
        "truncated",
        "empty",
        "pointer",
        "misnamed",
        "broken json",
        "list",
        "not utf-8",
        "type",
        "rank",
        "target",
        "no target",
    ],
)
def test_broken_adapters(plain, damage, parts):
    damage(plain)
    with pytest.raises(UserError) as error:
        load_adapter(llama(), plain)
    told(error, str(plain), *parts)


@pytest.mark.parametrize(
    ("base", "part"),
    [({"hidden": 24}, "size mismatch"), ({"layers": 1}, "layers.1"), ({"layers": 3}, "layers.2")],
    ids=["wider", "fewer layers", "more layers"],
)
def test_adapters_for_another_base(plain, base, part):
    with pytest.raises(UserError) as error:
        load_adapter(llama(**base), plain)
    told(error, "does not fit the base model", part)


def test_finding_the_adapted_model():
    model = adapt(llama(), adapter_config({"r": 2, "target_modules": ["q_proj"]}))
    outer = nn.ModuleDict({"other": nn.Linear(2, 2), "model": model})
    assert find_adapted(outer) is model
    assert isinstance(find_adapted(model), PeftModel)
    injected = llama()
    injected.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    assert find_adapted(nn.Sequential(injected)) is injected
    with pytest.raises(UserError) as error:
        find_adapted(nn.Linear(2, 2))
    told(error, "Linear contains no model that PEFT adapted")
