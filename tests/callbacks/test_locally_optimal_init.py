"""The callback around locally optimal initialisation, in a Lightning project of somebody else's."""

import random

import numpy as np
import pytest
import torch
from loi_project import IN, AtStart, Project, bases, loader, products, trained, trainer

from lightning_rlora.adapters import find_pairs, offset_factors
from lightning_rlora.callbacks import AdapterOnlyCheckpoint, LocallyOptimalInit
from lightning_rlora.errors import UserError
from lightning_rlora.init import locally_optimal_init


def first_batches(count):
    return [batch for _, batch in zip(range(count), loader(), strict=False)]


def eval_loss(module, batches):
    module.eval()
    with torch.no_grad():
        return sum(module.loss(batch).item() for batch in batches) / len(batches)


def same_start(got, expected):
    """The same column and row spaces and singular values; the signs of X0's triplets are the SVD's to choose."""
    return all(
        (x @ x.mT - y @ y.mT).norm() < 1e-4 * (y @ y.mT).norm()
        and (x.mT @ x - y.mT @ y).norm() < 1e-4 * (y.mT @ y).norm()
        for x, y in zip(got, expected, strict=True)
    )


@pytest.mark.parametrize("count", [1, 3])
def test_starts_where_the_function_does(tmp_path, count):
    """The same start as by hand, from the mean gradient of the first batches in evaluation mode."""
    module, by_hand, callback = Project(), Project(), LocallyOptimalInit(alpha=-0.1, batches=count)
    found = []
    watch = AtStart(lambda _, m: found.append((products(m), bases(m))))
    trainer(tmp_path, [callback, watch]).fit(module, loader())

    by_hand.eval()
    batches = first_batches(count)
    pristine = eval_loss(by_hand, batches)
    starts = locally_optimal_init(
        by_hand,
        lambda: [(by_hand.loss(b) / count).backward() for b in batches],
        alpha=-0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert same_start(found[0][0], products(by_hand))
    for base, x, before in zip(found[0][1], found[0][0], bases(Project()), strict=True):
        assert (base + x - before).norm() < 1e-6 * before.norm()
    assert [s.name for s in callback.starts] == [f"network.base_model.model.{layer}" for layer in ("first", "last")]
    assert [s.captured for s in callback.starts] == pytest.approx([s.captured for s in starts], rel=1e-4)
    assert callback.loss_before == pytest.approx(pristine, rel=1e-5)
    assert callback.loss_after == pytest.approx(pristine, rel=1e-5)
    assert callback.offset_taken == "subtract" and callback.done
    assert "offset subtract" in callback.report()
    assert all((x - y).norm() > 0.05 for x, y in zip(products(module), found[0][0], strict=True))  # it then trains


def test_makes_no_pass_too_many(tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(torch.is_grad_enabled())
        return module.loss(batch)

    callback = LocallyOptimalInit(batches=2, power_steps=2, loss=loss)
    trainer(tmp_path, [callback], max_steps=2).fit(Project(), loader())
    assert calls.count(True) == 2 * 2 * 3  # batches x 2 (q + 1)
    assert calls.count(False) == 2 * 2  # the loss before and after


def test_two_processes_start_at_the_same_point_from_their_mean_gradient(tmp_path):
    """Over gloo, each process with rows of its own."""
    seen = []

    def loss(module, batch):
        seen.append(batch)
        return module.loss(batch)

    def write(t, module):
        torch.save((products(module), bases(module), callback.loss_before, seen[0]), tmp_path / f"{t.global_rank}.pt")

    callback = LocallyOptimalInit(alpha=-0.1, loss=loss)
    trainer(tmp_path, [callback, AtStart(write)], max_steps=1, strategy="ddp_fork", devices=2).fit(Project(), loader())
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(x, y) for part in (0, 1) for x, y in zip(one[part], two[part], strict=True))
    assert one[2] == two[2]
    assert not torch.equal(one[3], two[3])
    rows = torch.cat([one[3], two[3]])
    by_hand = Project().eval()
    locally_optimal_init(
        by_hand,
        lambda: by_hand.loss(rows).backward(),
        alpha=-0.1,
        generator=torch.Generator().manual_seed(0),
    )
    assert same_start(one[0], products(by_hand))
    assert one[2] == pytest.approx(eval_loss(Project(), [rows]), rel=1e-5)


def random_states():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()


LOADERS = {
    "in order": lambda: loader(),
    "shuffled": lambda: loader(shuffle=True),
    "with a generator of its own": lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
    "workers": lambda: loader(shuffle=True, num_workers=1),
    "two loaders": lambda: {"one": loader(shuffle=True), "two": loader(shuffle=True)},
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_random_state_and_data_order_are_undisturbed(tmp_path, make):
    """Dropout masks, too: the run sees the same batches and draws the same numbers as one without LOI."""

    class Noisy(Project):
        def training_step(self, batch, batch_idx):
            random.random(), np.random.rand()
            batch = batch if isinstance(batch, torch.Tensor) else batch["one"] + batch["two"]
            return super().training_step(batch + 0.1 * torch.randn_like(batch), batch_idx)

        def on_train_batch_start(self, batch, batch_idx):
            super().on_train_batch_start(batch if isinstance(batch, torch.Tensor) else batch["one"], batch_idx)

    seen, states = [], []
    for with_loi in (True, False):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        module = Noisy()
        around = [AtStart(lambda *_: states.append(random_states())) for _ in range(2)]
        callbacks = [around[0], LocallyOptimalInit(batches=2), around[1]] if with_loi else around
        trainer(tmp_path, callbacks, max_steps=8).fit(module, make())
        states.append(random_states())
        seen.append(module.seen)
    for before, after in ((0, 1), (0, 3), (2, 5)):  # around LOI; against the run without, at its start and end
        for x, y in zip(states[before], states[after], strict=True):
            assert np.array_equal(x[1] if isinstance(x, tuple) else x, y[1] if isinstance(y, tuple) else y)
    assert len(seen[0]) == len(seen[1]) == 8
    assert all(torch.equal(x, y) for x, y in zip(*seen, strict=True))


def test_dropout_is_off_inside_and_modes_are_restored(tmp_path):
    module = Project()
    inside = []

    def loss(m, batch):
        inside.append(any(x.training for x in m.modules()))
        return m.loss(batch)

    def set_modes(_, m):
        m.train()
        m.network.base_model.model.last.eval()

    modes = []
    remember = AtStart(lambda _, m: modes.append({n: x.training for n, x in m.named_modules()}))
    trainer(tmp_path, [AtStart(set_modes), remember, LocallyOptimalInit(loss=loss), remember], max_steps=1).fit(
        module, loader()
    )
    assert not any(inside) and len(inside) == 6
    assert modes[0] == modes[1]
    assert any(modes[0].values()) and not all(modes[0].values())


def test_everything_is_restored_after_an_error(tmp_path):
    module = Project()
    kept, flags = trained(module), {n: p.requires_grad for n, p in module.named_parameters()}
    calls = []

    def loss(m, batch):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("in the middle")
        return m.loss(batch)

    t = trainer(tmp_path, [AtStart(lambda _, m: m.train()), LocallyOptimalInit(loss=loss)])
    with pytest.raises(RuntimeError, match="in the middle"):
        t.fit(module, loader())
    assert all(x.training for x in module.modules())
    assert "log" not in module.__dict__
    assert {n: p.requires_grad for n, p in module.named_parameters()} == flags
    tiny = 2e-3  # the optimizer's start on the manifold, of singular values 1e-6
    assert all((p - kept[n]).abs().max() < tiny for n, p in trained(module).items() if "lora_B" in n)


def test_logging_is_silent_inside_and_works_after(tmp_path):
    module = Project()
    counts = []
    t = trainer(
        tmp_path,
        [
            LocallyOptimalInit(batches=2),
            AtStart(lambda t, m: counts.append((m.metric.update_count, dict(t.logged_metrics)))),
        ],
        max_steps=6,
    )
    t.fit(module, loader())
    assert counts == [(0, {})]
    assert module.metric.update_count == 6
    assert {"loss_step", "loss_epoch", "also"} <= t.logged_metrics.keys()
    assert "log" not in module.__dict__


def test_training_steps_of_every_form(tmp_path):
    class Dictionary(Project):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "more": 1}

    class NoIndex(Project):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    class Nothing(Project):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    for kind in (Dictionary, NoIndex):
        callback = LocallyOptimalInit()
        trainer(tmp_path, [callback], max_steps=1).fit(kind(), loader())
        assert callback.done
    with pytest.raises(UserError, match="returns its loss"):
        trainer(tmp_path, [LocallyOptimalInit()], max_steps=1).fit(Nothing(), loader())


def test_batches_pass_through_the_modules_hooks(tmp_path):
    """What a training step sees has been through on_before_ and on_after_batch_transfer."""

    class Halved(Project):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch[:4]

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return 2 * batch

    seen = []

    def loss(module, batch):
        seen.append(batch.clone())
        return module.loss(batch)

    module = Halved()
    trainer(tmp_path, [LocallyOptimalInit(loss=loss)], max_steps=1).fit(module, loader())
    expected = 2 * first_batches(1)[0][:4]
    assert all(torch.equal(batch, expected) for batch in [*seen, *module.seen])


def test_manual_optimization(tmp_path):
    class Manual(Project):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.raises(UserError, match="manual optimization: give it loss=") as caught:
        trainer(tmp_path, [LocallyOptimalInit()]).fit(Manual(), loader())
    assert "\n" not in str(caught.value)
    callback = LocallyOptimalInit(loss=lambda module, batch: module.loss(batch))
    trainer(tmp_path, [callback]).fit(Manual(), loader())
    assert callback.done and len(callback.starts) == 2


def changes_of_the_loss(alpha):
    """|loss after - loss before| on the first batch with and without a shift of a bfloat16 base."""
    found = {}
    for subtract in (True, False):
        module = Project(dtype=torch.bfloat16).eval()
        (batch,) = first_batches(1)
        before = eval_loss(module, [batch])
        locally_optimal_init(
            module,
            lambda m=module, b=batch: m.loss(b).backward(),
            alpha=alpha,
            subtract=subtract,
            generator=torch.Generator().manual_seed(0),
        )
        found[subtract] = abs(eval_loss(module, [batch]) - before)
    return found


@pytest.mark.parametrize("alpha", [-1e-3, -0.01, -0.05, -1.0])
def test_auto_on_a_bfloat16_base_takes_the_smaller_change(tmp_path, alpha):
    changes = changes_of_the_loss(alpha)
    module, callback = Project(dtype=torch.bfloat16), LocallyOptimalInit(alpha=alpha)
    pristine, after = bases(module), []
    trainer(tmp_path, [callback, AtStart(lambda _, m: after.append(bases(m)))], max_steps=1).fit(module, loader())
    print(f"\nalpha {alpha}: change {changes[True]:.1e} subtracted, {changes[False]:.1e} not: {callback.offset_taken}")
    assert changes[True] != changes[False]
    assert callback.offset_taken == ("subtract" if changes[True] < changes[False] else "none")
    assert abs(callback.loss_after - callback.loss_before) == pytest.approx(min(changes.values()), rel=1e-3, abs=1e-9)
    identical = [torch.equal(x, y) for x, y in zip(pristine, after[0], strict=True)]
    offsets = [offset_factors(pair) for pair in find_pairs(module)]
    if callback.offset_taken == "none":
        assert all(identical) and offsets == [None, None]
    else:
        assert not any(identical) and None not in offsets


def test_both_outcomes_of_auto_occur():
    taken = {changes[True] <= changes[False] for changes in map(changes_of_the_loss, (-1e-3, -0.01, -0.05, -1.0))}
    assert taken == {True, False}


@pytest.mark.parametrize("offset", ["subtract", "none"])
def test_offset_as_asked_for(tmp_path, offset):
    module, callback = Project(), LocallyOptimalInit(alpha=-0.2, offset=offset)
    pristine = bases(module)
    trainer(tmp_path, [callback], max_steps=1).fit(module, loader())
    moved = [not torch.equal(x, y) for x, y in zip(pristine, bases(module), strict=True)]
    assert moved == [offset == "subtract"] * 2
    change = abs(callback.loss_after - callback.loss_before)
    assert change < 1e-6 if offset == "subtract" else change > 1e-4


def test_does_not_run_after_a_resume(tmp_path):
    calls = []

    def loss(module, batch):
        calls.append(1)
        return module.loss(batch)

    t = trainer(tmp_path, [LocallyOptimalInit(loss=loss)], max_steps=2)
    t.fit(Project(), loader())
    t.save_checkpoint(tmp_path / "two.ckpt")
    made = len(calls)
    again = LocallyOptimalInit(loss=loss)
    trainer(tmp_path, [again], max_steps=4).fit(Project(), loader(), ckpt_path=tmp_path / "two.ckpt")
    assert made > 0 and len(calls) == made
    assert again.done


@pytest.mark.parametrize("adapter_only", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_brings_function_and_weights_back(tmp_path, adapter_only, dtype):
    """Into a fresh module with the pristine base, by Trainer.fit(ckpt_path); full checkpoints load strictly."""

    def callbacks():
        extra = [AdapterOnlyCheckpoint()] if adapter_only else []
        return [LocallyOptimalInit(alpha=-0.3, offset="subtract"), *extra]

    whole = Project(dtype=dtype)
    t = trainer(tmp_path, callbacks(), max_steps=3)
    t.fit(whole, loader())
    t.save_checkpoint(tmp_path / "three.ckpt")
    shifted, weights = bases(whole), trained(whole)
    batch = first_batches(1)[0]
    outputs = whole.eval().network(batch[:, :IN].to(dtype))

    fresh = Project(dtype=dtype)
    assert not any(torch.equal(x, y) for x, y in zip(bases(fresh), shifted, strict=True))
    states = []
    look = AtStart(lambda _, m: states.append((bases(m), trained(m), m.eval().network(batch[:, :IN].to(dtype)))))
    t = trainer(tmp_path, [*callbacks(), look], max_steps=4)
    t.fit(fresh, loader(), ckpt_path=tmp_path / "three.ckpt")
    assert t.global_step == 4
    assert fresh.strict_loading  # the callback leaves the module as it was
    got_bases, got_weights, got_outputs = states[0]
    assert all(torch.equal(x, y) for x, y in zip(got_bases, shifted, strict=True))
    assert all(torch.equal(got_weights[n], w) for n, w in weights.items())
    assert torch.equal(got_outputs, outputs)


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    """In evaluation mode, since Lightning restores no random state: no dropout, batches in order, one epoch."""

    class Quiet(Project):
        def on_train_batch_start(self, batch, batch_idx):
            self.eval()

    ends = []
    for stop in (6, 3):
        module = Quiet()
        t = trainer(tmp_path, [LocallyOptimalInit(alpha=-0.3), AdapterOnlyCheckpoint()], max_steps=stop)
        t.fit(module, loader())
        if stop < 6:
            t.save_checkpoint(tmp_path / "half.ckpt")
            module = Quiet()
            t = trainer(tmp_path, [LocallyOptimalInit(alpha=-0.3), AdapterOnlyCheckpoint()], max_steps=6)
            rest = torch.utils.data.DataLoader(torch.utils.data.Subset(loader().dataset, range(24, 48)), batch_size=8)
            rest = [*rest, *rest]  # Lightning skips the three batches that the epoch has had
            t.fit(module, torch.utils.data.DataLoader(RestOf(rest), batch_size=None), ckpt_path=tmp_path / "half.ckpt")
        ends.append(trained(module))
    assert all(torch.equal(w, ends[1][n]) for n, w in ends[0].items())


class RestOf(torch.utils.data.Dataset):
    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        return self.batches[i]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0}, "alpha = 0"),
        ({"batches": 0}, "batches >= 1"),
        ({"oversampling": -1}, "oversampling >= 0"),
        ({"power_steps": -1}, "power_steps >= 0"),
        ({"offset": "maybe"}, "unknown offset 'maybe'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        LocallyOptimalInit(**options)


def test_no_batch(tmp_path):
    empty = torch.utils.data.DataLoader([torch.zeros(3)], batch_size=2, drop_last=True)

    class Allowing(Project):
        allow_zero_length_dataloader_with_multiple_devices = True

    callback = LocallyOptimalInit()
    trainer(tmp_path, [callback]).fit(Allowing(), empty)  # Lightning itself skips training
    assert not callback.done
