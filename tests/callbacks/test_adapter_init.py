"""AdapterInit: once, before the first step, without a trace in the data order; and what it refuses."""

import pytest
import torch
from loi_project import AtStart, Project, bases, loader, products, trained, trainer
from torch import nn

from lightning_rlora.adapters import OLoRA, Passes, PiSSA, Start, Stiefel, find_pairs, matrix, offset_factors
from lightning_rlora.callbacks import AdapterInit, AdapterOnlyCheckpoint, LocallyOptimalInit
from lightning_rlora.errors import UserError
from lightning_rlora.init import LoRAGA
from lightning_rlora.optim import RiemannianSGD, Riemannion


def adamw(module):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)


def outputs(module):
    module.eval()
    with torch.no_grad():
        found = module.network(next(iter(loader()))[:, :12])
    module.train()
    return found


STARTS = [(PiSSA(), True), (OLoRA(), True), (Stiefel("both"), True), (LoRAGA(2), True), (Stiefel("A"), False)]


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("start, shifts", STARTS)
def test_the_function_is_unchanged_and_the_base_is_shifted_if_need_be(tmp_path, start, shifts, use_dora):
    module, callback = Project(make_optimizer=adamw, use_dora=use_dora), AdapterInit(start)
    pristine, before, after = bases(module), outputs(module), []
    look = AtStart(
        lambda _, m: after.append((outputs(m), bases(m), products(m), [offset_factors(p) for p in find_pairs(m)]))
    )
    trainer(tmp_path, [callback, look], max_steps=1).fit(module, loader())
    found, shifted, changes, offsets = after[0]
    assert float((found - before).abs().max() / before.abs().max()) < 1e-5  # measured 3e-7
    assert callback.loss_after == pytest.approx(callback.loss_before, rel=1e-5)
    for base, new, change, offset in zip(pristine, shifted, changes, offsets, strict=True):
        assert (offset is not None) == shifts == bool(change.norm() > 0.1)
        torch.testing.assert_close(new.double(), base.double() - change, rtol=0, atol=1e-6)


def test_data_order_and_random_state_are_left_alone(tmp_path):
    runs = []
    for callbacks in ([], [AdapterInit(Stiefel("A"))]):
        module = Project(make_optimizer=adamw)
        torch.manual_seed(5)
        trainer(tmp_path, callbacks, max_steps=4).fit(module, loader(shuffle=True))
        runs.append((module.seen, torch.rand(3)))
    assert all(torch.equal(x, y) for x, y in zip(runs[0][0], runs[1][0], strict=True))
    assert torch.equal(runs[0][1], runs[1][1])  # dropout drew as often


class Counting(Start):
    calls = 0
    shifts_base = False

    def set_factors(self, model, pairs, passes, generator):
        Counting.calls += 1
        nn.init.orthogonal_(pairs[0].a, generator=generator)


def test_it_runs_once_and_a_checkpoint_brings_the_same_base_back(tmp_path):
    t = trainer(tmp_path, [AdapterInit(PiSSA(niter=2)), AdapterOnlyCheckpoint()], max_steps=2)
    module = Project(make_optimizer=adamw)
    t.fit(module, loader())
    t.save_checkpoint(tmp_path / "two.ckpt")
    states = []
    look = AtStart(lambda _, m: states.append((bases(m), trained(m))))
    again = AdapterInit(Counting())
    fresh = Project(make_optimizer=adamw)
    t = trainer(tmp_path, [again, AdapterOnlyCheckpoint(), look], max_steps=3)
    t.fit(fresh, loader(), ckpt_path=tmp_path / "two.ckpt")
    assert again.done and Counting.calls == 0
    assert all(torch.equal(x, y) for x, y in zip(states[0][0], bases(module), strict=True))
    assert all(torch.equal(states[0][1][name], value) for name, value in trained(module).items())


def test_what_is_refused(tmp_path):
    trained_before = Project(make_optimizer=adamw)
    nn.init.normal_(find_pairs(trained_before)[0].b)
    with pytest.raises(UserError, match=r"holds an update already.*PiSSA would throw away"):
        trainer(tmp_path, [AdapterInit(PiSSA())]).fit(trained_before, loader())
    with pytest.raises(UserError, match="holds an update already"):
        both = [LocallyOptimalInit(alpha=0.1), AdapterInit(PiSSA())]
        trainer(tmp_path, both).fit(Project(make_optimizer=adamw), loader())


class Random(Start):
    """Moves the function, as LoftQ does, and draws from the global generator, as PEFT's starts do."""

    shifts_base = False

    @torch.no_grad()
    def set_factors(self, model, pairs, passes, generator):
        for pair in pairs:
            nn.init.normal_(pair.a)
            nn.init.normal_(pair.b)


def test_dora_starts_at_the_base_and_the_product(tmp_path):
    after = []
    for use_dora in (False, True):
        look = AtStart(lambda _, m: after.append(outputs(m)))
        module = Project(make_optimizer=adamw, use_dora=use_dora)
        trainer(tmp_path, [AdapterInit(Random()), look], max_steps=1).fit(module, loader())
    torch.testing.assert_close(after[1], after[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("start", [Random(), PiSSA(niter=1)])
def test_the_seed_governs_everything_random(tmp_path, start):
    found = []
    for elsewhere, seed in ((5, 0), (6, 0), (5, 1)):
        module = Project(make_optimizer=adamw)
        torch.manual_seed(elsewhere)
        look = AtStart(lambda _, m: found.append(torch.cat([x.flatten() for x in products(m)])))
        trainer(tmp_path, [AdapterInit(start, seed=seed), look], max_steps=1).fit(module, loader())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("factor", ["A", "B"])
@pytest.mark.parametrize("optimizer", [Riemannion, RiemannianSGD])
def test_a_zero_factor_costs_no_step_on_the_manifold(tmp_path, factor, optimizer):
    module = Project(make_optimizer=lambda m: optimizer.for_model(m, lr=0.02))
    spaces, kept = [], "b" if factor == "B" else "a"
    look = AtStart(lambda _, m: spaces.extend(matrix(getattr(p, kept)).detach().double() for p in find_pairs(m)))
    callback, before = AdapterInit(Stiefel(factor)), outputs(module)
    trainer(tmp_path, [callback, look], max_steps=1).fit(module, loader())
    assert float((outputs(module) - before).norm() / before.norm()) > 5e-4  # measured 1.5e-3; 4e-7 if skipped
    assert callback.loss_after == pytest.approx(callback.loss_before, rel=1e-4)
    drawn = Project()
    pairs = find_pairs(drawn)
    Stiefel(factor).set_factors(drawn, pairs, None, torch.Generator().manual_seed(0))
    for space, pair in zip(spaces, pairs, strict=True):
        both = [space, matrix(getattr(pair, kept)).detach().double()]
        both = torch.cat([x if kept == "a" else x.mT for x in both])
        rows = nn.functional.normalize(both, dim=1)
        assert int(torch.linalg.matrix_rank(rows, rtol=1e-4)) == 2  # the optimizer's start keeps the drawn space


def test_two_processes_start_from_their_mean_gradient(tmp_path):
    """Over gloo, each process with rows of its own."""

    seen = []

    def loss(module, batch):
        seen.append(batch)
        return module.loss(batch)

    def write(t, module):
        torch.save((products(module), bases(module), seen[0]), tmp_path / f"{t.global_rank}.pt")

    callbacks = [AdapterInit(LoRAGA(1), loss=loss), AtStart(write)]
    module = Project(make_optimizer=adamw)
    trainer(tmp_path, callbacks, max_steps=1, strategy="ddp_fork", devices=2).fit(module, loader())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(x, y) for part in (0, 1) for x, y in zip(one[part], two[part], strict=True))
    assert not torch.equal(one[2], two[2])
    alone = Project(make_optimizer=adamw).eval()
    passes = Passes([one[2], two[2]], None, alone.loss)
    LoRAGA(2).set_factors(alone, find_pairs(alone), passes, torch.Generator().manual_seed(0))
    for x, y in zip(one[0], products(alone), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_processes_fail_together(tmp_path, monkeypatch):
    t = trainer(tmp_path, [AdapterInit(PiSSA())])
    monkeypatch.setattr(t.strategy, "reduce_boolean_decision", lambda decision, all=True: False)
    with pytest.raises(UserError, match="PiSSA failed in another process"):
        t.fit(Project(make_optimizer=adamw), loader())
