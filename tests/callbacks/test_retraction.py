"""The Retraction callback under optimizers of torch's and under ours."""

import pytest
import torch
from loi_project import AfterEveryBatch, AtStart, Project, loader, products, trained, trainer

from lightning_rlora.adapters import find_pairs, group_by_shape, matrix
from lightning_rlora.callbacks import Retraction
from lightning_rlora.optim import RiemannianSGD, Riemannion, WhitenedRiemannion, parameter_groups
from lightning_rlora.optim.balance import imbalance

FOREIGN = {
    "adamw": lambda m: torch.optim.AdamW(parameter_groups(m), lr=0.02),
    "sgd": lambda m: torch.optim.SGD(parameter_groups(m), lr=0.02),
    "sgd with momentum": lambda m: torch.optim.SGD(parameter_groups(m), lr=0.02, momentum=0.9),
}
OURS = {
    "riemannion": lambda m: Riemannion.for_model(m, lr=0.02),
    "riemannian sgd": lambda m: RiemannianSGD.for_model(m, lr=0.2),
}


class Quiet(Project):
    """Without dropout, with factors that are no zeros, and a look at every step before the callback has its turn."""

    def __init__(self, make_optimizer, start=0.3):
        super().__init__(make_optimizer=make_optimizer)
        self.before = []
        if start:
            generator = torch.Generator().manual_seed(5)
            for pair in find_pairs(self):
                pair.b.data.copy_(start * torch.randn(pair.b.shape, generator=generator))

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.eval()

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()

        def look(optimizer, args, kwargs):
            state = {
                id(f): {k: v.clone() for k, v in optimizer.state[f].items() if isinstance(v, torch.Tensor)}
                for pair in find_pairs(self)
                for f in (pair.a, pair.b)
            }
            factors = [(matrix(p.a).detach().clone(), matrix(p.b).detach().clone()) for p in find_pairs(self)]
            self.before.append((products(self), factors, state))

        optimizer.register_step_post_hook(look)
        return optimizer


def worst_imbalance(module):
    return max(float(imbalance(batch).max()) for batch in group_by_shape(find_pairs(module)))


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_balances_after_every_real_step_of_another_optimizer(tmp_path, make, accumulate):
    module, callback = Quiet(make), Retraction()
    drift, checked = [], []

    def after(trainer, m):
        drift.append(worst_imbalance(m))
        if len(m.before) == len(checked):
            return  # a micro-batch without a step
        checked.append(1)
        earlier, factors, state = m.before[-1]
        for x, y in zip(products(m), earlier, strict=True):
            assert (x - y).norm() < 1e-6 * y.norm()  # the product stays: measured 5e-8
        optimizer = trainer.optimizers[0]
        for pair, (a, b) in zip(find_pairs(m), factors, strict=True):
            s = (matrix(pair.a).detach().double() @ torch.linalg.pinv(a.double())).float()  # A' = S A
            assert ((matrix(pair.b) @ s - b).norm() < 1e-5 * b.norm()).item()
            # moments are gradients' means: grad_A' = S^-T grad_A, grad_B' = grad_B S^T
            for f, rule in ((pair.a, lambda g, s=s: torch.linalg.inv(s).mT @ g), (pair.b, lambda g, s=s: g @ s.mT)):
                for name, old in state[id(f)].items():
                    new = optimizer.state[f][name]
                    expected = rule(old) if name in ("exp_avg", "momentum_buffer") else old
                    if name in ("exp_avg_sq", "step"):
                        assert torch.equal(new, old)
                    else:
                        assert (new - expected).norm() <= 1e-5 * expected.norm()  # measured 1e-7

    t = trainer(tmp_path, [callback, AfterEveryBatch(after)], max_steps=5, accumulate_grad_batches=accumulate)
    t.fit(module, loader())
    assert callback.steps == t.global_step == len(checked) == 5
    assert len(drift) == (5 if accumulate == 1 else 16)  # micro-batches: epochs of six make steps of four and two
    assert max(drift[accumulate - 1 :]) < 1e-5  # measured 8e-8
    assert callback.healed == 0


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_without_it_factors_drift_apart(tmp_path, make):
    """So that the test above can fail."""
    module = Quiet(make)
    drift = []
    trainer(tmp_path, [AfterEveryBatch(lambda t, m: drift.append(worst_imbalance(m)))], max_steps=5).fit(
        module, loader()
    )
    assert drift[-1] > 1e-2


def test_plain_sgd_moves_along_the_gradient_of_the_new_gauge(tmp_path):
    """Against SGD on balanced factors done by hand: after each step the product's balanced form, and on."""
    module, by_hand = Quiet(FOREIGN["sgd"]), Quiet(FOREIGN["sgd"])
    trainer(tmp_path, [Retraction()], max_steps=4).fit(module, loader())
    by_hand.eval()
    for _, batch in zip(range(4), loader(), strict=False):
        by_hand.zero_grad()
        by_hand.loss(batch).backward()
        with torch.no_grad():
            for pair in find_pairs(by_hand):
                a, b = pair.a - 0.02 * pair.a.grad, pair.b - 0.02 * pair.b.grad
                u, s, vt = torch.linalg.svd(pair.scaling * b.double() @ a.double(), full_matrices=False)
                root = (s[:2] / pair.scaling).sqrt()
                pair.b.copy_(u[:, :2] * root)
                pair.a.copy_(root.unsqueeze(1) * vt[:2])
    for x, y in zip(products(module), products(by_hand), strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()  # measured 4e-7


def test_pefts_zero_start_is_left_alone_until_it_is_a_point(tmp_path):
    module = Quiet(FOREIGN["adamw"], start=0)
    assert all(not pair.b.any() for pair in find_pairs(module))
    drift = []
    trainer(tmp_path, [Retraction(), AfterEveryBatch(lambda t, m: drift.append(worst_imbalance(m)))], max_steps=4).fit(
        module, loader()
    )
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert max(drift[1:]) < 1e-5


def whitened(module):
    return WhitenedRiemannion.for_model(module, lr=0.2, relative=False)


@pytest.mark.parametrize("make", [*OURS.values(), whitened], ids=[*OURS, "whitened"])
def test_under_our_optimizers_nothing_changes(tmp_path, make):
    ends = []
    for callbacks in ([], [Retraction(check_every=1)]):
        module = Quiet(make)
        trainer(tmp_path, callbacks, max_steps=8).fit(module, loader())
        ends.append(trained(module))
    assert callbacks[0].steps == 8 and callbacks[0].healed == 0
    assert all(torch.equal(w, ends[1][n]) for n, w in ends[0].items())
    assert (worst_imbalance(module) > 1e-2) == (make is whitened)  # balanced in another metric, and not to be healed


def mix(module):
    """Other factors of the same products, as a project that rescales its adapters would leave them."""
    s = torch.tensor([[2.0, 0.3], [-0.5, 1.0]])
    with torch.no_grad():
        for pair in find_pairs(module):
            pair.a.copy_(s @ pair.a)
            pair.b.copy_(pair.b @ torch.linalg.inv(s))


@pytest.mark.parametrize("make", OURS.values(), ids=OURS)
@pytest.mark.parametrize("check_every", [1, 3])
def test_drift_under_our_optimizers_is_healed_and_momentum_carried(tmp_path, make, check_every):
    """Factors spoilt by a hook that fires right after a step are healed at the next check; the products' path stays."""
    spoilt_at = 3

    class Spoilt(Quiet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()

            def spoil(*_):
                if len(self.before) == spoilt_at:
                    mix(self)

            optimizer.register_step_post_hook(spoil)
            return optimizer

    healed, plain = Spoilt(make), Quiet(make)
    callback = Retraction(check_every=check_every)
    drift = []
    look = AfterEveryBatch(lambda t, m: drift.append(worst_imbalance(m)))
    trainer(tmp_path, [callback, look], max_steps=6).fit(healed, loader())
    trainer(tmp_path, [], max_steps=6).fit(plain, loader())
    assert callback.healed == 2 and callback.steps == 6
    assert max(drift) < 1e-4
    for x, y in zip(products(healed), products(plain), strict=True):
        assert (x - y).norm() < 1e-5 * y.norm()  # measured 2e-7


def test_says_what_it_does(tmp_path, caplog):
    said = (
        (FOREIGN["adamw"], "AdamW moves free factors"),
        (OURS["riemannion"], "its invariants are checked"),
        (whitened, "balanced in its own metric"),
    )
    for make, words in said:
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer(tmp_path, [Retraction()], max_steps=1).fit(Quiet(make), loader())
        assert words in caplog.text


def test_unhooks_at_the_end_and_after_an_exception(tmp_path):
    def fail(t, m):
        raise RuntimeError("stop")

    for extra in ([], [AfterEveryBatch(fail)]):
        module, callback = Quiet(FOREIGN["adamw"]), Retraction()
        t = trainer(tmp_path, [callback, *extra], max_steps=2)
        if extra:
            with pytest.raises(RuntimeError, match="stop"):
                t.fit(module, loader())
        else:
            t.fit(module, loader())
        steps = callback.steps
        t.optimizers[0].step()
        assert callback.steps == steps > 0


def test_counters_are_resumed(tmp_path):
    t = trainer(tmp_path, [Retraction()], max_steps=3)
    t.fit(Quiet(FOREIGN["adamw"]), loader())
    t.save_checkpoint(tmp_path / "three.ckpt")
    again = Retraction()
    trainer(tmp_path, [again, AtStart(lambda *_: None)], max_steps=5).fit(
        Quiet(FOREIGN["adamw"]), loader(), ckpt_path=tmp_path / "three.ckpt"
    )
    assert again.steps == 5
