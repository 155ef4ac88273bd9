"""LoRA-GA against the dense SVD of materialised gradients."""

import pytest
import torch
from gradient_cases import dense_gradients, llama_backward, start_of, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_rlora.adapters import Passes, find_pairs, matrix
from lightning_rlora.errors import UserError
from lightning_rlora.init import LoRAGA

BATCHES = [torch.randint(0, 61, (6, 20), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def tiny_gpt2(r=3):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=20, initializer_range=0.2)
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}
    return get_peft_model(GPT2LMHeadModel(config), LoraConfig(**settings)).eval()


def start(model, scale=1.0, **options):
    pairs = find_pairs(model)
    passes = Passes(BATCHES, model, lambda ids: scale * model(input_ids=ids, labels=ids).loss)
    LoRAGA(batches=2, **options).set_factors(model, pairs, passes, torch.Generator().manual_seed(0))
    return pairs


def outside(vectors, space):
    """The largest share of a unit column that lies outside the span of orthonormal columns."""
    unit = nn.functional.normalize(vectors.detach().double(), dim=0)
    return float((unit - space @ (space.mT @ unit)).norm(dim=0).max())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_factors_are_the_papers(make):
    model = make()
    gradients = dense_gradients(model, find_pairs(model), llama_backward(model, seeds=(0, 1)))
    for pair, gradient in zip(start(model, oversampling=64), gradients, strict=True):
        m, _, r = pair.shape
        u, _, vt = torch.linalg.svd(gradient)
        assert outside(matrix(pair.a).mT, vt[:r].mT) < 1e-4  # measured 9e-7
        assert outside(matrix(pair.b), u[:, r : 2 * r]) < 1e-4  # measured 7e-6
        values = torch.linalg.svdvals(start_of(pair))
        expected = torch.full((r,), pair.scaling * m**0.5 / 16, dtype=torch.float64)
        torch.testing.assert_close(values[:r], expected, rtol=1e-5, atol=0)
        for factor in (matrix(pair.a), matrix(pair.b).mT):
            torch.testing.assert_close(factor @ factor.mT, torch.eye(r) * m**0.5 / 16, rtol=0, atol=1e-5)


def test_the_scale_of_the_loss_does_not_matter():
    one, other = start(tiny_llama()), start(tiny_llama(), scale=1024.0)
    for x, y in zip(one, other, strict=True):
        difference = (start_of(x) - start_of(y)).norm() / start_of(x).norm()
        assert difference < 1e-4  # measured 0


def test_modules_stay_in_their_modes_and_parameters_as_they_were():
    model = tiny_llama()
    model.base_model.model.model.training = True  # as for gradient checkpointing
    modes = [m.training for m in model.modules()]
    parameters = [(id(p), p.requires_grad) for p in model.parameters()]
    seen = []
    passes = Passes(
        BATCHES,
        model,
        lambda ids: (seen.append([m.training for m in model.modules()]), model(input_ids=ids, labels=ids).loss)[1],
    )
    LoRAGA(batches=2).set_factors(model, find_pairs(model), passes, torch.Generator().manual_seed(0))
    assert len(seen) == 4 * 2
    assert all(mode == modes for mode in seen)
    assert [(id(p), p.requires_grad) for p in model.parameters()] == parameters
    assert all(p.grad is None for p in model.parameters())


def test_what_is_refused():
    with pytest.raises(UserError, match=r"LoRA-GA needs 2r <= min\(m, n\)"):
        start(tiny_gpt2(r=9))
    for options in (
        {"batches": 0},
        {"stable_gamma": 0},
        {"stable_gamma": float("nan")},
        {"oversampling": -1},
        {"power_steps": -1},
    ):
        with pytest.raises(UserError, match="LoRAGA needs batches >= 1, stable_gamma > 0"):
            LoRAGA(**options)
