"""AdapterInit: once, before the first step, without a trace in the data order; and what it refuses."""

import pytest
import torch
from loi_project import AtStart, Project, bases, loader, products, trained, trainer
from torch import nn

from lightning_rlora.adapters import PiSSA, Start, Stiefel, find_pairs, offset_factors
from lightning_rlora.callbacks import AdapterInit, AdapterOnlyCheckpoint, LocallyOptimalInit
from lightning_rlora.errors import UserError


def adamw(module):
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)


def outputs(module):
    module.eval()
    with torch.no_grad():
        found = module.network(next(iter(loader()))[:, :12])
    module.train()
    return found


@pytest.mark.parametrize("start, shifts", [(PiSSA(), True), (Stiefel("both"), True), (Stiefel("A"), False)])
def test_the_function_is_unchanged_and_the_base_is_shifted_if_need_be(tmp_path, start, shifts):
    module, callback = Project(make_optimizer=adamw), AdapterInit(start)
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
