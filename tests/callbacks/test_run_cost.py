"""The cost of a run: training seconds without validations, tokens, parameters."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from toy_runs import ToyModule, fit

from lightning_rlora.callbacks import RunCost, run_cost


class Clock:
    """A clock that other code moves."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Spend(Callback):
    """Let time pass: 5 s before the first step, 1 s a step and 1000 s a validation."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_start(self, *_):
        self.clock.now += 5

    def on_train_batch_start(self, *_):
        self.clock.now += 1

    def on_validation_batch_end(self, *_):
        self.clock.now += 500


def test_seconds_leave_validations_out_and_later_callbacks_in(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(run_cost, "time", clock)
    fit(tmp_path, callbacks=[RunCost(), Spend(clock)], max_steps=7, val_check_interval=2)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["seconds"] == [[2, 7.0], [4, 9.0], [6, 11.0], [7, 12.0]]
    assert cost["device"] == "cpu"
    module = ToyModule()
    assert cost["parameters"] == sum(p.numel() for p in module.parameters())
    assert cost["trainable_parameters"] == 2 * (6 + 8) * 2
    assert (cost["samples"], cost["tokens"]) == (0, 0)  # the toy's batches are no dictionaries
    assert cost["peak_memory"] is None or cost["peak_memory"] >= cost["memory_reserved_99th"] > 0


def test_tokens_are_counted(tmp_path):
    cost = RunCost()

    class Feed(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            cost.on_train_batch_end(trainer, module, outputs, {"input_ids": torch.zeros(3, 5)}, batch_idx)

    fit(tmp_path, callbacks=[cost, Feed()], max_steps=2, limit_val_batches=0)
    content = json.loads((tmp_path / "cost.json").read_text())
    assert (content["samples"], content["tokens"]) == (6, 30)


@pytest.mark.parametrize("options", [{"fast_dev_run": True}])
def test_a_trial_leaves_no_file(tmp_path, options):
    fit(tmp_path, callbacks=[RunCost()], **options)
    assert not (tmp_path / "cost.json").exists()
