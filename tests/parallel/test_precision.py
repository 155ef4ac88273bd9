"""Mixed precision is that of DDP under every strategy, with its scaler."""

import pytest
import torch
from fits import fit, identical
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from processes import launch


class Overflow(Callback):
    """Makes the gradients of the last process infinite in one batch, and notes the scale and the weights after each."""

    def __init__(self):
        self.scales, self.weights = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.hook = None
        if batch_idx == 2 and trainer.global_rank == trainer.world_size - 1:
            lm = pl_module.model.base_model.model
            lm = getattr(lm, "_fsdp_wrapped_module", lm)
            self.hook = lm.lm_head.register_forward_hook(lambda module, args, output: output * Infinite.apply(output))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.hook is not None:
            self.hook.remove()
        self.scales.append(trainer.precision_plugin.scaler.get_scale())
        self.weights.append([p.detach().clone() for p in pl_module.parameters() if p.requires_grad])


class Infinite(torch.autograd.Function):
    """One, of which the derivative is infinite."""

    @staticmethod
    def forward(ctx, x):
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, gradient):
        return torch.full_like(gradient, torch.inf)


def overflown(strategy, count, folder, accumulate):
    note = Overflow()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugins = (MixedPrecision("16-mixed", "cpu", scaler),)
    case = {"dtype": torch.float32, "accumulate": accumulate, "steps": 6 // accumulate}
    run = fit(strategy, count, folder=folder, plugins=plugins, callbacks=(note,), save=folder / "run.ckpt", **case)
    return run, note.scales, note.weights


@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_processes_leave_out_a_step_in_which_one_overflows(accumulate, tmp_path):
    runs = {
        name: launch(2, overflown, name, 2, tmp_path / name, accumulate, folder=tmp_path / name)
        for name in ("ddp", "fsdp1", "fsdp2")
    }
    before, after = 1, 1 + accumulate
    for name, ((first, scales, weights), (second, others, _)) in runs.items():
        assert identical(first, second) and identical(first, runs["ddp"][0][0]), name
        assert scales == others
        assert (scales[before], scales[after]) == (1024.0, 512.0)
        assert all(torch.equal(x, y) for x, y in zip(weights[before], weights[after], strict=True))
        assert not torch.equal(weights[after][0], weights[-1][0])
        saved = torch.load(tmp_path / name / "run.ckpt", weights_only=True)
        assert saved["MixedPrecision"]["scale"] == 512.0  # the same entry under every strategy


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_precision_is_that_of_ddp(strategy, precision):
    ddp, other = (
        Trainer(strategy=name, precision=precision, accelerator="cpu", devices=1).precision_plugin
        for name in ("ddp", strategy)
    )
    assert type(other) is type(ddp) and other.precision == precision
