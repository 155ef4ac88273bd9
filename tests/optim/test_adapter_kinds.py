"""The Riemannian optimizers train what PEFT makes of LoRA: DoRA, rsLoRA, and adapters of a base in NF4."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft_layers import adapted
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lightning_rlora.adapters import find_pairs
from lightning_rlora.optim import RiemannianSGD, Riemannion, WhitenedRiemannion

OPTIMIZERS = {
    "riemannion": lambda model: Riemannion.for_model(model, lr=0.05, adamw_lr=1e-3),
    "whitened": lambda model: WhitenedRiemannion.for_model(model, lr=0.05, relative=False, adamw_lr=1e-3),
    "sgd": lambda model: RiemannianSGD.for_model(model, lr=0.3, adamw_lr=1e-3),
    "simulated adam": lambda model: RiemannianSGD.for_model(model, lr=0.05, simulate_adam=True, adamw_lr=1e-3),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def train(model, optimizer, loss_of, steps=40):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def token_loss(model):
    tokens = torch.randint(0, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    return model(input_ids=tokens, labels=tokens).loss


def teachers_loss(model):
    """How far a model is from what it would be with other factors, as a share of how far it is now."""
    teacher = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for pair in find_pairs(teacher):
            pair.b.copy_(torch.randn(pair.b.shape, generator=generator) * len(pair.b) ** -0.5)
    tokens = torch.randint(0, 30, (16, 7), generator=generator)
    with torch.no_grad():
        wanted, now = teacher(tokens), model(tokens)
    return lambda model: (model(tokens) - wanted).square().mean() / (now - wanted).square().mean()


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=72,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


@every_optimizer
@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}, {"use_dora": True, "use_rslora": True}])
def test_dora_and_rslora_train(make, fields):
    """On every kind of layer; DoRA's magnitudes train beside the pairs, with AdamW."""
    model = adapted(**fields)
    optimizer = make(model)
    algorithms = {id(p): group["algorithm"] for group in optimizer.param_groups for p in group["params"]}
    magnitudes = {n: p for n, p in model.named_parameters() if "magnitude" in n}
    before = {n: p.detach().clone() for n, p in magnitudes.items()}
    assert bool(magnitudes) == fields.get("use_dora", False)
    assert all(algorithms[id(p)] == "adamw" for p in magnitudes.values())
    assert all(algorithms[id(pair.a)] != "adamw" for pair in find_pairs(model))
    losses = train(model, optimizer, teachers_loss(model))
    print(f"\n{losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.5 * losses[0]
    assert all(not torch.equal(p, before[n]) for n, p in magnitudes.items())


@pytest.fixture(scope="module")
def nf4_base(tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    small_llama().save_pretrained(folder)

    def build():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        base = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)

    return build


@every_optimizer
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_a_base_in_nf4_trains(make, fields, nf4_base):
    """QLoRA, also with DoRA and rsLoRA: the packed base stays as it is."""
    base = nf4_base()
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **fields)).train()
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert any(not p.is_floating_point() for p in packed.values())
    losses = train(model, make(model), token_loss)
    print(f"\n{losses[0]:.3f} -> {losses[-1]:.3f}")
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
