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


class Device:
    """A GPU's account of its memory, on a CPU: what is held, and the peak since the last reset."""

    def __init__(self, monkeypatch, held):
        self.held = self.peak = held
        monkeypatch.setattr(run_cost, "_on_cuda", lambda trainer: True)
        for name, answer in {
            **{"init": lambda: None, "synchronize": lambda: None, "get_device_name": lambda: "a device"},
            **{"memory_reserved": lambda: 0, "memory_allocated": lambda: self.held},
            **{"max_memory_allocated": lambda: self.peak, "reset_peak_memory_stats": self.reset},
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)

    def reset(self):
        self.peak = self.held

    def use(self, size):
        """Take some memory and give it back."""
        self.peak = max(self.peak, self.held + size)


class Use(Callback):
    """Take memory at each step, and much more in validations."""

    def __init__(self, device, step, validation):
        self.device, self.step, self.validation = device, step, validation

    def on_train_batch_start(self, trainer, *_):
        self.device.use(self.step + trainer.global_step)

    def on_validation_batch_start(self, *_):
        self.device.use(self.validation)


def test_the_peak_is_of_training_and_of_a_module_that_was_on_the_device_before(tmp_path, monkeypatch):
    size = sum(4 * p.numel() for p in ToyModule().parameters())  # all on the device, as a quantized base is
    device = Device(monkeypatch, held=1000 + size)
    fit(tmp_path, callbacks=[RunCost(), Use(device, 50, 10**6)], max_steps=7, val_check_interval=2)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert cost["peak_memory"] == size + 50 + 6  # step 6, after the last validation but one


def test_a_quantized_weight_counts_with_what_it_needs_to_be_read():
    functional = pytest.importorskip("bitsandbytes").functional
    packed, state = functional.quantize_4bit(torch.randn(64, 128), compress_statistics=True)
    weight = torch.nn.Parameter(packed, requires_grad=False)
    weight.quant_state = state
    module = torch.nn.Module()
    module.weight, module.bias = weight, torch.nn.Parameter(torch.zeros(3))
    module.same = module.bias
    module.register_buffer("scales", torch.zeros(2, 5, dtype=torch.float16))
    nested = state.state2
    scales = (state.absmax, state.code, state.offset, nested.absmax, nested.code)
    expected = 64 * 128 // 2 + 12 + 20 + sum(t.nbytes for t in scales)
    assert run_cost._bytes_of(module, torch.device("cpu")) == expected
    assert run_cost._bytes_of(module, torch.device("meta")) == 0
