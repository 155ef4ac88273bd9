"""Checkpoints without the frozen base, in a Lightning project of somebody else's."""

from copy import deepcopy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from loi_project import AtStart, Project, loader, trained, trainer

from lightning_rlora.adapters import check_adapter, find_pairs, get_offset
from lightning_rlora.callbacks import AdapterOnlyCheckpoint, LocallyOptimalInit
from lightning_rlora.errors import UserError


def checkpoint_of(tmp_path, module=None, callbacks=(), steps=3):
    module = module or Project()
    t = trainer(tmp_path, [AdapterOnlyCheckpoint(), *callbacks], max_steps=steps)
    t.fit(module, loader())
    path = tmp_path / "some.ckpt"
    t.save_checkpoint(path)
    return module, path


def test_holds_what_trains_and_the_offset_and_nothing_else(tmp_path):
    module, path = checkpoint_of(tmp_path, callbacks=[LocallyOptimalInit(alpha=-0.3)])
    saved = torch.load(path, weights_only=True)
    factors = {n for n, p in module.named_parameters() if p.requires_grad}
    offsets = [key for key in saved["state_dict"] if "manifold_offset" in key]
    assert sorted(key.rpartition(".")[2] for key in offsets) == ["fingerprint"] * 2 + ["left"] * 2 + ["right"] * 2
    assert saved["state_dict"].keys() == factors | set(offsets)
    assert {"optimizer_states", "lr_schedulers", "callbacks", "loops"} <= saved.keys()
    assert len(saved["optimizer_states"][0]["state"]) == 4


def test_heads_are_kept(tmp_path):
    module = Project()
    module.head = torch.nn.Linear(3, 2)
    module.frozen = torch.nn.Linear(3, 2).requires_grad_(False)
    _, path = checkpoint_of(tmp_path, module)
    keys = torch.load(path, weights_only=True)["state_dict"].keys()
    assert {"head.weight", "head.bias"} <= keys
    assert not any("frozen" in key or key.endswith("base_layer.weight") for key in keys)


def test_resumes_to_the_bit(tmp_path):
    whole, path = checkpoint_of(tmp_path)
    fresh, found = Project(), []
    with torch.no_grad():
        for pair in find_pairs(fresh):
            pair.a.add_(1.0)
    look = AtStart(lambda t, m: found.append((trained(m), deepcopy(t.optimizers[0].state_dict()["state"]))))
    t = trainer(tmp_path, [AdapterOnlyCheckpoint(), look], max_steps=4)
    t.fit(fresh, loader(), ckpt_path=path)
    assert t.global_step == 4
    assert all(torch.equal(found[0][0][n], w) for n, w in trained(whole).items())
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]["state"]
    for key, state in saved.items():
        assert state.keys() == {"momentum", "anchor"}
        assert all(torch.equal(found[0][1][key][name], value) for name, value in state.items())


def test_works_with_model_checkpoint(tmp_path):
    saving = ModelCheckpoint(dirpath=tmp_path, filename="at-{step}", every_n_train_steps=2, save_top_k=-1)
    t = trainer(tmp_path, [AdapterOnlyCheckpoint(), saving], max_steps=4, enable_checkpointing=True)
    t.fit(Project(), loader())
    small = torch.load(tmp_path / "at-step=4.ckpt", weights_only=True)["state_dict"]
    assert sorted(p.name for p in tmp_path.glob("at-*")) == ["at-step=2.ckpt", "at-step=4.ckpt"]
    assert not any(key.endswith("base_layer.weight") for key in small)


class OneLayer(Project):
    """Another adapter: only one of the two layers."""

    def __init__(self):
        super().__init__()
        for name, p in self.named_parameters():
            if "last" in name:
                p.requires_grad_(False)


class WithHead(Project):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Project(r=3), "it was made with another rank"),
        (WithHead, "the checkpoint has no 'head.weight'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence(tmp_path, make, message):
    _, path = checkpoint_of(tmp_path)
    module = make()
    before = trained(module)
    with pytest.raises(UserError, match=message) as caught:
        trainer(tmp_path, [AdapterOnlyCheckpoint()], max_steps=4).fit(module, loader(), ckpt_path=path)
    assert "\n" not in str(caught.value)
    # nothing was loaded; the optimizer's start on the manifold has a size of 1e-3
    assert all((p - before[n]).abs().max() < 2e-3 for n, p in trained(module).items() if "lora_B" in n)
    assert all(torch.equal(p, before[n]) for n, p in trained(module).items() if "head" in n)


def test_another_base_is_refused(tmp_path):
    _, path = checkpoint_of(tmp_path, callbacks=[LocallyOptimalInit(alpha=-0.3)])
    other = Project()
    with torch.no_grad():
        for pair in find_pairs(other):
            pair.layer.get_base_layer().weight.mul_(1.5)
    with pytest.raises(UserError, match="trained on another base model"):
        trainer(tmp_path, [LocallyOptimalInit(), AdapterOnlyCheckpoint()], max_steps=4).fit(
            other, loader(), ckpt_path=path
        )


def test_unhooks(tmp_path):
    module, _ = checkpoint_of(tmp_path)
    assert not module._load_state_dict_pre_hooks
    module.load_state_dict({}, strict=False)  # an ordinary load is nobody's business again


def test_the_offset_comes_back_without_the_callback_that_made_it(tmp_path):
    whole, path = checkpoint_of(tmp_path, callbacks=[LocallyOptimalInit(alpha=-0.3)])
    fresh, found = Project(), []
    look = AtStart(lambda t, m: found.append([get_offset(pair).left.clone() for pair in find_pairs(m)]))
    trainer(tmp_path, [AdapterOnlyCheckpoint(), look], max_steps=4).fit(fresh, loader(), ckpt_path=path)
    for left, pair in zip(found[0], find_pairs(whole), strict=True):
        assert left.shape[1] > 0
        assert torch.equal(left, get_offset(pair).left)


def test_an_offset_without_a_place_is_refused(tmp_path):
    _, path = checkpoint_of(tmp_path, callbacks=[LocallyOptimalInit(alpha=-0.3)])
    with pytest.raises(UserError, match="track_offsets"):
        check_adapter(Project(), torch.load(path, weights_only=True)["state_dict"])


def test_statistics_of_a_trained_head_are_kept(tmp_path):
    module = Project()
    module.head = torch.nn.BatchNorm1d(3)
    module.frozen = torch.nn.BatchNorm1d(3).requires_grad_(False)
    _, path = checkpoint_of(tmp_path, module)
    keys = torch.load(path, weights_only=True)["state_dict"].keys()
    assert {"head.weight", "head.running_mean", "head.num_batches_tracked"} <= keys
    assert not any("frozen" in key for key in keys)
