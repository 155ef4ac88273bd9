"""A loss that is not finite ends the run under the number of its step, and nothing is saved in between."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_rlora import CausalLM, UserError
from lightning_rlora.modules.finite_loss import FiniteLoss


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_on_a_cpu_a_loss_is_read_at_once(bad):
    losses = FiniteLoss()
    losses.note(torch.tensor(1.5), 0)
    with pytest.raises(UserError, match=f"{bad} at step 1"):
        losses.note(torch.tensor(bad), 1)
    losses.check()


class Arrived:
    """In the place of a GPU's event."""

    def synchronize(self):
        pass


class LateLoss(FiniteLoss):
    """Reads every loss late, as on a GPU."""

    def note(self, loss, step):
        self.check()
        self._unread = loss.detach().clone(), Arrived(), step


def train(module, folder, steps, callbacks=()):
    ids = torch.arange(2, 14).view(1, 12)
    loader = DataLoader([{"input_ids": ids, "labels": ids}] * steps, batch_size=None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    options = {"max_steps": steps, "callbacks": [*callbacks], "enable_checkpointing": False}
    Trainer(accelerator="cpu", default_root_dir=folder, **quiet, **options).fit(module, loader)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_loss_that_is_read_late_is_never_saved(steps, tmp_path, monkeypatch):
    module = CausalLM(adapter={"r": 2})
    monkeypatch.setattr("lightning_rlora.modules.adapted_model.FiniteLoss", LateLoss)
    # a constant, the gradient is zero and no optimizer notices
    module.loss = lambda batch, output: output.loss * 0 + (math.nan if module.global_step == steps - 1 else 1.0)
    reached, saved = [], []

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            reached.append(trainer.global_step)
            trainer.save_checkpoint(tmp_path / "a.ckpt")
            saved.append(trainer.global_step)

    with pytest.raises(UserError, match=f"nan at step {steps - 1}"):
        train(module, tmp_path, 4, [Save()])
    assert reached == [*range(1, steps + 1)]
    assert saved == [*range(1, steps)]


def test_the_last_loss_is_read_too(tmp_path, monkeypatch):
    module = CausalLM(adapter={"r": 2})
    monkeypatch.setattr("lightning_rlora.modules.adapted_model.FiniteLoss", LateLoss)
    module.loss = lambda batch, output: output.loss * 0 + (math.nan if module.global_step == 1 else 1.0)
    with pytest.raises(UserError, match="nan at step 1"):
        train(module, tmp_path, 2)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait():
    good, bad = (torch.tensor(value, device="cuda") for value in (1.5, math.nan))
    losses = FiniteLoss()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses.note(good, 0)
        losses.note(bad, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(UserError, match="nan at step 1"):
        losses.note(good, 2)
    with pytest.raises(UserError, match="nan at step 1"):  # and whoever saves is told so again
        losses.check()
