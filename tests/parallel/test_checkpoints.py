"""Checkpoints of one process, DDP, FSDP1 and FSDP2 are the same file, and each goes on under each of the others."""

import pytest
import torch
from fits import Seeds, distance, fit, identical
from processes import launch

WORLDS = [("one", 1), ("ddp", 2), ("fsdp1", 2), ("fsdp2", 3)]
CASE = {"loi": True, "accumulate": 2}
TOLERANCE = 1e-12  # measured 2e-15


def path_of(folder, strategy):
    return folder / f"{strategy}.ckpt"


def first_half(strategy, count, folder):
    return fit(strategy, count, folder=folder, steps=10, save=path_of(folder, strategy), **CASE)


def second_half(strategy, count, folder):
    def resumed(checkpoint):
        return fit(strategy, count, folder=folder, resume=checkpoint, first=20, **CASE)

    return [resumed(path_of(folder, other)) for other, _ in WORLDS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for strategy, count in WORLDS:
        launch(count, first_half, strategy, count, folder, folder=folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return launch(1, lambda: fit(folder=folder, **CASE), folder=folder)[0]


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world[0])
def test_a_run_goes_on_under_every_strategy(world, saved, uninterrupted, tmp_path):
    processes = launch(world[1], second_half, *world, saved, folder=tmp_path)
    for run in processes[0]:
        assert distance(run, uninterrupted) < TOLERANCE
    for other in processes[1:]:
        assert all(identical(x, y) for x, y in zip(processes[0], other, strict=True))


def test_files_are_alike_and_hold_the_adapter_only(saved):
    one, *others = (torch.load(path_of(saved, strategy), weights_only=True) for strategy, _ in WORLDS)
    assert all(".lora_" in key or "manifold_offset" in key for key in one["state_dict"])
    for other, (_, count) in zip(others, WORLDS[1:], strict=True):
        assert other.keys() == one.keys()
        assert len(other["rng"]) == count
        assert other["optimizer_states"][0]["param_groups"] == one["optimizer_states"][0]["param_groups"]
        states = [(c["state_dict"], c["optimizer_states"][0]["state"]) for c in (one, other)]
        for (weights, state), (other_weights, other_state) in [states]:
            assert weights.keys() == other_weights.keys()
            assert all(type(value) is torch.Tensor for value in other_weights.values())
            assert all(torch.allclose(weights[key], other_weights[key], atol=1e-12) for key in weights)
            for index, entry in state.items():
                assert entry.keys() == other_state[index].keys()
                assert all(torch.allclose(entry[name], other_state[index][name], atol=1e-12) for name in entry)


def dropped_out(strategy, count, folder):
    """An uninterrupted run, and one that is resumed in processes whose random states are other ones by then."""
    case = {"dropout": 0.3, "method": "AdamW", "folder": folder, "steps": 8}
    whole = fit(strategy, count, callbacks=(Seeds(1),), **case)
    fit(strategy, count, callbacks=(Seeds(1),), save=folder / "half.ckpt", **case | {"steps": 4})
    return whole, fit(strategy, count, callbacks=(Seeds(5),), resume=folder / "half.ckpt", first=4, **case)


@pytest.mark.parametrize("world", [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2)], ids=lambda world: world[0])
def test_every_process_goes_on_with_its_own_random_state(world, tmp_path):
    for whole, resumed in launch(world[1], dropped_out, *world, tmp_path, folder=tmp_path):
        assert torch.equal(whole["losses"][4:], resumed["losses"])
        assert identical(whole, resumed)
