"""Probing: products with the dense gradient from backward passes, and nothing left behind."""

import pytest
import torch
from adapted_models import KINDS, llama, one_layer, randomise
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from lightning_rlora.adapters import find_pairs
from lightning_rlora.adapters.probes import probing


def relative(x, y):
    return float((x - y).norm() / y.norm())


def products(model, pairs, backward, widths):
    omegas = [torch.randn(pair.shape[1], k).to(pair.a) for pair, k in zip(pairs, widths, strict=True)]
    qs = [torch.randn(pair.shape[0], k).to(pair.a) for pair, k in zip(pairs, widths, strict=True)]
    with probing(model, pairs, backward) as probes:
        return omegas, probes.multiply(omegas), qs, probes.multiply_transposed(qs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 3, 6])
def test_products_with_the_base_models_gradient(kind, width):
    case = one_layer(kind)
    pairs = find_pairs(case.model)
    omegas, right, qs, left = products(case.model, pairs, lambda: case.model(case.x).backward(), [width])
    with torch.no_grad():
        pairs[0].b.zero_()  # the gradient is that of the base alone
    gradient = case.dense_gradient()
    assert relative(right[0], gradient @ omegas[0]) < 1e-13  # measured at most 5e-16
    assert relative(left[0], gradient.mT @ qs[0]) < 1e-13


def test_backward_passes_add_up():
    case = one_layer("Linear")
    pairs = find_pairs(case.model)
    other = torch.randn_like(case.x)

    def backward():
        (case.model(case.x) / 2).backward()
        (case.model(other) / 2).backward()

    omegas, right, _, _ = products(case.model, pairs, backward, [4])
    with torch.no_grad():
        pairs[0].b.zero_()
    gradient = case.dense_gradient() / 2
    case.x = other
    gradient += case.dense_gradient() / 2
    assert relative(right[0], gradient @ omegas[0]) < 1e-13


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
def test_dora(kind):
    """PEFT's magnitudes start as the norms, so the norm-detached gradient is the base's own at that start."""
    case = one_layer(kind, use_dora=True)
    pairs = find_pairs(case.model)
    layer = case.peft_layer
    norm = case.as_matrix(layer.base_layer.weight.detach()).norm(dim=1)
    magnitude = layer.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.copy_(norm.reshape(magnitude.shape))
    omegas, right, qs, left = products(case.model, pairs, lambda: case.model(case.x).backward(), [4])
    with torch.no_grad():
        pairs[0].b.zero_()
    gradient = case.dense_gradient()
    assert relative(right[0], gradient @ omegas[0]) < 1e-12
    assert relative(left[0], gradient.mT @ qs[0]) < 1e-12


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(quantised_llama, bits):
    model = randomise(get_peft_model(quantised_llama(bits), LoraConfig(r=3, target_modules=["q_proj", "down_proj"])))
    pairs = find_pairs(model)
    seen = {}

    def record(layer, inputs, output):
        output.retain_grad()
        seen[layer] = inputs[0].detach(), output

    def backward():
        model(torch.arange(12).reshape(2, 6)).logits.square().sum().backward()

    for pair in pairs:
        pair.layer.register_forward_hook(record)
    omegas, right, qs, left = products(model, pairs, backward, [5, 4, 3, 2])
    for pair, omega, g_omega, q, gt_q in zip(pairs, omegas, right, qs, left, strict=True):
        x, y = seen[pair.layer]  # of the last pass; every pass is the base's own function
        gradient = y.grad.flatten(0, 1).mT @ x.flatten(0, 1)
        assert relative(g_omega, gradient @ omega) < 1e-5  # measured at most 3e-7 in float32
        assert relative(gt_q, gradient.mT @ q) < 1e-5


def test_all_layers_at_once_and_of_different_widths():
    model = get_peft_model(llama().double(), LoraConfig(r=2, target_modules="all-linear")).double()
    randomise(model)
    pairs = find_pairs(model)
    ids = torch.arange(12).reshape(2, 6)
    passes = []

    def backward():
        passes.append(1)
        model(ids).logits.square().sum().backward()

    widths = [2 + i % 3 for i in range(len(pairs))]
    omegas, right, qs, left = products(model, pairs, backward, widths)
    assert len(passes) == 2
    with model.disable_adapter():
        for pair in pairs:
            pair.layer.base_layer.weight.requires_grad_(True)
        backward()
    for pair, omega, g_omega, q, gt_q in zip(pairs, omegas, right, qs, left, strict=True):
        gradient = pair.layer.base_layer.weight.grad
        assert relative(g_omega, gradient @ omega) < 1e-12  # measured at most 4e-16
        assert relative(gt_q, gradient.mT @ q) < 1e-12


def test_a_layer_that_the_loss_does_not_see_has_zero_products():
    model = randomise(get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"])))
    pairs = find_pairs(model)
    first = model.base_model.model.model.layers[0]

    def backward():
        hidden = torch.randn(1, 3, 16)
        first.self_attn.q_proj(hidden).square().sum().backward()

    _, right, _, left = products(model, pairs, backward, [3, 3])
    assert float(right[0].norm()) > 0
    assert torch.equal(right[1], torch.zeros(16, 3))
    assert torch.equal(left[1], torch.zeros(16, 3))


def snapshot(model):
    return {n: (p, p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}


def check_same(model, before):
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, trains, gradient) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == trains
        assert parameter.grad is gradient


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Embedding"])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(kind, fails):
    case = one_layer(kind, use_dora=True)
    case.model(case.x).backward()
    gradients = [p.grad.clone() for p in case.model.parameters() if p.grad is not None]
    before = snapshot(case.model)
    pairs = find_pairs(case.model)

    def backward():
        case.model(case.x).backward()
        if fails:
            raise RuntimeError("no data")

    try:
        products(case.model, pairs, backward, [4])
        assert not fails
    except RuntimeError as error:
        assert fails and str(error) == "no data"
    check_same(case.model, before)
    kept = [p.grad for p in case.model.parameters() if p.grad is not None]
    assert len(kept) == 3  # both factors and the magnitude
    assert all(torch.equal(x, y) for x, y in zip(kept, gradients, strict=True))


def test_heads_and_other_parameters_get_no_gradient_meanwhile():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    before = snapshot(model)
    pairs = find_pairs(model)
    backward = lambda: model(torch.arange(12).reshape(2, 6)).logits.square().sum().backward()  # noqa: E731
    products(model, pairs, backward, [3, 3])
    check_same(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_pass_multiplies_no_more_than_a_training_pass_of_the_same_width():
    """But less: the gradient of one factor is not taken, and so none of m x n."""
    model = get_peft_model(llama(), LoraConfig(r=5, target_modules="all-linear"))
    pairs = find_pairs(model)
    ids = torch.arange(12).reshape(2, 6)
    counts = []

    def backward():
        with FlopCounterMode(display=False) as counter:
            model(ids).logits.square().sum().backward()
        counts.append(counter.get_total_flops())

    backward()
    model.zero_grad()
    products(model, pairs, backward, [5] * len(pairs))
    training, right, left = counts
    assert right <= training - sum(2 * ids.numel() * 5 * pair.shape[1] for pair in pairs)
    assert left <= training - sum(2 * ids.numel() * 5 * pair.shape[0] for pair in pairs)


def test_the_factors_of_a_pass_take_no_memory_of_their_own():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    pairs = find_pairs(model)
    blocks = [torch.randn(16, 4) for _ in pairs]
    inside = []

    def backward():
        for pair in pairs:
            a, b = (pair.layer.__getattr__(f"lora_{x}")["default"].weight for x in "AB")
            inside.append((a.untyped_storage(), b.untyped_storage(), a.requires_grad, b.requires_grad))
        model(torch.arange(12).reshape(2, 6)).logits.sum().backward()

    with probing(model, pairs, backward) as probes:
        found = probes.multiply(blocks), probes.multiply_transposed(blocks)
        held = [p.grad for pair in pairs for p in pair.layer.parameters()]
    for block, (a, b, a_trains, b_trains) in zip(blocks, inside[:2], strict=True):
        assert (a.data_ptr(), b.nbytes(), a_trains, b_trains) == (block.data_ptr(), 4, False, True)
    for block, (a, b, a_trains, b_trains) in zip(blocks, inside[2:], strict=True):
        assert (a.nbytes(), b.data_ptr(), a_trains, b_trains) == (4, block.data_ptr(), True, False)
    assert all(gradient is None for gradient in held)  # the products are the caller's alone
    assert all(product.norm() > 0 for side in found for product in side)
