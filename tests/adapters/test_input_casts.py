"""Inputs of LoRA layers under autocast: not cast up and down again, and the numbers the same."""

import copy
from functools import partial

import pytest
import torch
from adapted_models import IDS, llama
from peft import LoraConfig, get_peft_model

from lightning_rlora import CausalLM
from lightning_rlora.adapters import leave_casts_to_autocast


def adapted(*, checkpointing=False, **fields):
    torch.manual_seed(0)
    base = llama(layers=2).to(torch.bfloat16)
    if checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **fields)
    return get_peft_model(base, config).train()


def gradients(model):
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def seen_by_a(model):
    """Dtypes of what the matrices A are given, as the passes go."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    return seen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_to_the_bit(checkpointing):
    model = adapted(checkpointing=checkpointing)
    changed = copy.deepcopy(model)
    leave_casts_to_autocast(changed)
    seen = seen_by_a(changed)
    wanted, found = gradients(model), gradients(changed)
    assert set(seen) == {torch.bfloat16}
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_inputs_are_cast_again_outside_autocast():
    model = adapted()
    leave_casts_to_autocast(model)
    seen = seen_by_a(model)
    gradients(model)
    layers = model.get_base_model().model
    for call in (model, layers, partial(model.generate, max_new_tokens=2, do_sample=False), copy.deepcopy(layers)):
        seen.clear()
        call(input_ids=IDS)
        assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        model(input_ids=IDS)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_dropout": 0.3}])
def test_norms_and_masks_keep_their_dtype(fields):
    model = adapted(**fields)
    changed = copy.deepcopy(model)
    leave_casts_to_autocast(changed)
    torch.manual_seed(1)
    wanted = gradients(model)
    torch.manual_seed(1)
    found = gradients(changed)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_language_models_leave_casts_to_autocast():
    module = CausalLM(adapter={"r": 2}, dtype="bfloat16")
    seen = seen_by_a(module)
    ids = torch.arange(20).view(2, 10)
    with torch.autocast("cpu", torch.bfloat16):
        module({"input_ids": ids, "labels": ids})
    assert set(seen) == {torch.bfloat16}
