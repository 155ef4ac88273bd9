"""Resuming, closures, loss scaling, schedulers, and what surrounds a step."""

import copy
import io

import pytest
import torch
from peft_layers import adapted, hand_over, products, random_gradients

from lightning_rlora.adapters import find_pairs
from lightning_rlora.errors import UserError
from lightning_rlora.optim import LinearWithWarmup, PolynomialWithWarmup, RiemannianSGD, Riemannion

OPTIMIZERS = {
    "riemannion": lambda model: Riemannion.for_model(model, lr=0.02, weight_decay=0.1),
    "sgd": lambda model: RiemannianSGD.for_model(model, lr=0.1),
    "simulated adam": lambda model: RiemannianSGD.for_model(model, lr=0.02, simulate_adam=True),
}


def others(model):
    return [p for n, p in model.named_parameters() if "modules_to_save" in n]


def all_gradients(model, step):
    """Gradients of a step: a function of the step alone, so that a resumed run gets the same."""
    generator = torch.Generator().manual_seed(100 + step)
    pairs = find_pairs(model)
    hand_over(pairs, random_gradients(pairs, generator))
    for p in others(model):
        p.grad = torch.randn(p.shape, generator=generator)


def trained(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_resumed_run_repeats_the_uninterrupted_one_to_the_bit(make):
    model = adapted()
    optimizer = make(model)
    for step in range(12):
        if step == 5:
            file = io.BytesIO()
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        all_gradients(model, step)
        optimizer.step()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = adapted(seed=5)
    fresh = make(resumed)  # built before the weights are loaded, as in Lightning
    resumed.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])
    for step in range(5, 12):
        all_gradients(resumed, step)
        fresh.step()
    for name, value in trained(model).items():
        assert torch.equal(trained(resumed)[name], value), name
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][key])


def test_without_the_loaded_state_the_resumed_run_is_another():
    """So that the test above can fail."""
    runs = []
    for forget in (False, True):
        model = adapted()
        optimizer = OPTIMIZERS["riemannion"](model)
        for step in range(8):
            if forget and step == 5:
                optimizer = OPTIMIZERS["riemannion"](model)
            all_gradients(model, step)
            optimizer.step()
        runs.append(products(model))
    assert all((x - y).norm() > 1e-2 * x.norm() for x, y in zip(*runs, strict=True))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_is_small_plain_and_in_the_factors_dtype(make):
    model = adapted()
    optimizer = make(model)
    all_gradients(model, 0)
    optimizer.step()
    for pair in find_pairs(model):
        m, n, r = pair.shape
        state = [optimizer.state[f] for f in (pair.a, pair.b)]
        assert state[0]["momentum"].shape == pair.a.shape and state[1]["momentum"].shape == pair.b.shape
        assert sum(t.numel() for one in state for t in one.values()) <= (m + n) * r + 2 * r * (r + 8) + 4
        assert all(t.dtype == torch.float32 for one in state for t in one.values())


def test_closure_runs_first_and_with_gradients_enabled():
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    tokens = torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(0))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = model(tokens).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        with torch.no_grad():
            loss = optimizer.step(closure)
        other.zero_grad()
        expected = twin(tokens).square().mean()
        expected.backward()
        other.step()
        assert loss.item() == expected.item()
    assert calls == [True] * 3
    assert all(torch.equal(value, trained(twin)[name]) for name, value in trained(model).items())


def test_grad_scaler():
    """A scaled run takes the same steps, and none where the scaled gradients overflow."""
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    tokens = torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(0))
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(model(tokens).square().mean()).backward()
        if step == 2:
            next(find_pairs(model)[0].layer.parameters()).grad = None
            find_pairs(model)[1].a.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.zero_grad()
            twin(tokens).square().mean().backward()
            other.step()
    assert scaler.get_scale() == 2.0**9
    for x, y in zip(products(model), products(twin), strict=True):
        assert (x - y).norm() <= 1e-5 * x.norm()  # a power of two: measured 0


def test_gradient_accumulation():
    """The mean over micro-batches is the gradient of the whole batch."""
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    tokens = torch.randint(0, 30, (8, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        for part in tokens.chunk(4):
            (model(part).square().mean() / 4).backward()
        optimizer.step()
        other.zero_grad()
        twin(tokens).square().mean().backward()
        other.step()
    for x, y in zip(products(model), products(twin), strict=True):
        assert (x - y).norm() <= 1e-4 * x.norm()  # measured 2e-6


def test_a_pair_without_a_gradient_is_skipped():
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    for step in range(4):
        for m in (model, twin):
            all_gradients(m, step)
        skipped = find_pairs(model)[2]
        if step in (0, 2):
            skipped.a.grad = skipped.b.grad = None
        before = [skipped.a.detach().clone(), skipped.b.detach().clone()]
        state = {k: v.clone() for k, v in optimizer.state[skipped.a].items()}
        optimizer.step()
        other.step()
        if step in (0, 2):
            assert torch.equal(skipped.a, before[0]) and torch.equal(skipped.b, before[1])
            assert all(torch.equal(optimizer.state[skipped.a][k], v) for k, v in state.items())
    for i, (x, y) in enumerate(zip(products(model), products(twin), strict=True)):
        assert (i == 2) == ((x - y).norm() > 1e-6 * x.norm())
    model.zero_grad()
    before = trained(model)
    optimizer.step()  # no gradient at all
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


@pytest.fixture
def restored_precision():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    legacy = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(legacy)
    for backend, precision in zip(backends, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_is_restored_and_does_not_matter(precision, restored_precision):
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    for step in range(3):
        all_gradients(model, step)
        all_gradients(twin, step)
        torch.set_float32_matmul_precision(precision)
        optimizer.step()
        assert torch.get_float32_matmul_precision() == precision
        torch.set_float32_matmul_precision("highest")
        other.step()
    assert all(torch.equal(value, trained(twin)[name]) for name, value in trained(model).items())


def test_the_newer_precision_switches(restored_precision):
    """torch.get_float32_matmul_precision raises once these were used; a step must not."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    model = adapted()
    optimizer = OPTIMIZERS["riemannion"](model)
    all_gradients(model, 0)
    optimizer.step()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_an_outer_autocast_changes_nothing():
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    for step in range(3):
        all_gradients(model, step)
        all_gradients(twin, step)
        with torch.autocast("cpu", torch.bfloat16):
            optimizer.step()
            assert torch.is_autocast_enabled("cpu")
        other.step()
    assert all(torch.equal(value, trained(twin)[name]) for name, value in trained(model).items())


def test_schedulers_drive_every_group():
    makers = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
        "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=8, cycle_momentum=False),
        # cycles the beta1 of AdamW groups, and not the momentum of pairs
        "one cycle, momentum": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=8),
        "ours": lambda o: LinearWithWarmup(o, warmup=0.25, total_steps=8),
        "ours, momentum": lambda o: PolynomialWithWarmup(o, warmup=0.25, momentum=(0.5, 0.9), total_steps=8),
    }
    for name, make in makers.items():
        model, twin = adapted(), adapted()
        optimizer, by_hand = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
        scheduler = make(optimizer)
        rates, momenta = [], []
        for step in range(6):
            all_gradients(model, step)
            all_gradients(twin, step)
            for group, other in zip(optimizer.param_groups, by_hand.param_groups, strict=True):
                other |= {name: group[name] for name in ("lr", "momentum", "betas")}
            rates.append(optimizer.param_groups[0]["lr"])
            momenta.append(optimizer.param_groups[0]["momentum"])
            optimizer.step()
            by_hand.step()
            scheduler.step()
        assert len(set(rates)) > 3, name
        assert len(set(momenta)) == (6 if name == "ours, momentum" else 1), name
        assert all(torch.equal(value, trained(twin)[key]) for key, value in trained(model).items()), name


def test_step_hooks_fire_once_per_step():
    model = adapted()
    optimizer = OPTIMIZERS["riemannion"](model)
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for step in range(3):
        all_gradients(model, step)
        optimizer.step()
    assert len(seen) == 3


def test_a_copy_of_model_and_optimizer_goes_on_like_the_original():
    model = adapted()
    optimizer = Riemannion.for_model(model, lr=0.05, max_tangent_norm=0.5)
    for step in range(3):
        all_gradients(model, step)
        optimizer.step()
    other, copied = copy.deepcopy((model, optimizer))
    assert copied.max_tangent_norm == 0.5
    for m, o in ((model, optimizer), (other, copied)):
        all_gradients(m, 3)
        o.step()
    for name, value in trained(model).items():
        assert torch.equal(trained(other)[name], value), name


def test_factors_keep_their_directions_from_step_to_step():
    """A mean of factors over steps is near the factors, so that weight averaging works."""
    model = adapted()
    optimizer = Riemannion.for_model(model, lr=1e-3)
    for step in range(30):
        old = [pair.b.detach().clone() for pair in find_pairs(model)]
        all_gradients(model, step % 3)
        optimizer.step()
        if step > 20:
            for pair, b in zip(find_pairs(model), old, strict=True):
                assert (pair.b.flatten(1) * b.flatten(1)).sum(0).min() > 0


def test_factors_reset_to_zero_start_again():
    model = adapted()
    optimizer = Riemannion.for_model(model, lr=0.05)
    all_gradients(model, 0)
    optimizer.step()
    with torch.no_grad():
        find_pairs(model)[0].b.zero_()
    for step in range(1, 4):
        all_gradients(model, step)
        optimizer.step()
    for pair, product in zip(find_pairs(model), products(model), strict=True):
        assert torch.isfinite(product).all()
        assert torch.linalg.matrix_rank(product, rtol=1e-6) == pair.shape[2]


def test_other_pairs_step_where_one_was_reset():
    model, twin = adapted(), adapted()
    optimizer, other = OPTIMIZERS["riemannion"](model), OPTIMIZERS["riemannion"](twin)
    for step in range(2):
        if step == 1:
            with torch.no_grad():
                find_pairs(model)[0].b.zero_()
        for m, o in ((model, optimizer), (twin, other)):
            all_gradients(m, step)
            o.step()
    found = products(model)
    assert found[0].norm() < 1e-4  # the start that replaces a zero product
    for x, y in zip(found[1:], products(twin)[1:], strict=True):
        assert (x - y).norm() <= 1e-6 * y.norm()  # measured 0


def test_the_state_of_another_optimizer_or_adapter_is_refused():
    model = adapted()
    optimizer = Riemannion.for_model(model, lr=0.05)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(UserError, match="another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    all_gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["momentum"] = state["state"][0]["momentum"][:1]
    with pytest.raises(UserError, match="another rank"):
        optimizer.load_state_dict(state)
