"""Sizes of base weights against their singular values."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from lightning_rlora.adapters import base_size, find_pairs
from lightning_rlora.adapters.pairs import base_weight


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.convolution = nn.Conv2d(3, 10, 3)
        self.linear = nn.Linear(12, 16)


def test_a_size_is_the_root_mean_square_of_the_singular_values():
    torch.manual_seed(0)
    model = get_peft_model(Layers().double(), LoraConfig(r=2, target_modules=["embedding", "convolution", "linear"]))
    for pair in find_pairs(model):
        values = torch.linalg.svdvals(base_weight(pair).detach().flatten(1))
        assert base_size(pair) == pytest.approx(values.square().mean().sqrt().item(), rel=1e-14)
    nn.init.zeros_(base_weight(pair))
    assert base_size(pair) == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(quantised_llama, bits):
    model = get_peft_model(quantised_llama(bits), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    ids = torch.arange(6)[None]
    before = model(input_ids=ids).logits
    sizes = [base_size(pair) for pair in find_pairs(model)]
    assert torch.equal(model(input_ids=ids).logits, before)  # measuring leaves the layer as it was
    assert [base_size(pair) for pair in find_pairs(model)] == sizes
    for pair, size in zip(find_pairs(model), sizes, strict=True):
        m, n, _ = pair.shape
        weight = dequantize_module_weight(pair.layer.get_base_layer()).double()
        assert weight.shape == (m, n)
        assert size == pytest.approx((weight.square().sum() / min(m, n)).sqrt().item(), rel=1e-6)
