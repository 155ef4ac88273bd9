"""The package inside other people's projects."""

import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_rlora import AdapterOnlyCheckpoint, LocallyOptimalInit, Retraction, Riemannion, find_pairs

sys.path.insert(0, str(Path(__file__).parent / "projects"))

from existing_project import Classifier
from own_language_model import CountingData, SmoothedLM

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class WithRiemannion(Classifier):
    """The existing project with the first of its added lines."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if not torch.is_inference_mode_enabled() and self.trainer.training:
            self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return Riemannion.for_model(self.model, lr=0.1, max_tangent_norm=1.0)


def fit(precision, tmp_path, accelerator="cpu", extra=(), **options):
    module, start, retraction = WithRiemannion(), LocallyOptimalInit(alpha=0.05, batches=2), Retraction(check_every=1)
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_epochs=16,
        accumulate_grad_batches=4,
        default_root_dir=tmp_path,
        callbacks=[start, retraction, AdapterOnlyCheckpoint(), *extra],
        **QUIET,
        **options,
    )
    trainer.fit(module)
    return trainer, module, start, retraction


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_existing_project_gains_the_manifold_by_added_lines(precision, tmp_path):
    trainer, module, start, retraction = fit(precision, tmp_path)
    check(trainer, module, start, retraction)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(key.endswith("base_layer.weight") for key in saved)
    assert any("lora_A" in key for key in saved)
    assert any("manifold_offset" in key for key in saved)
    assert any("modules_to_save" in key for key in saved)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_same_on_a_gpu(precision, tmp_path):
    check(*fit(precision, tmp_path, accelerator="gpu"))


def check(trainer, module, start, retraction):
    assert start.done
    assert abs(start.loss_after - start.loss_before) < 2e-3  # the rounding of bfloat16; in float32 below 1e-6
    assert retraction.steps == trainer.global_step == 16 * 4  # real steps only
    assert retraction.healed == 0
    first, last = sum(module.losses[:16]) / 16, sum(module.losses[-16:]) / 16
    assert last < 0.8 * first
    for pair in find_pairs(module):
        gram_b, gram_a = pair.b.mT @ pair.b, pair.a @ pair.a.mT
        torch.testing.assert_close(gram_b, gram_a, atol=2e-5, rtol=1e-4)


def test_clipping_by_the_trainer_stays_what_it_is_in_a_foreign_project(tmp_path):
    norms = []

    class Recorder(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            if gradients:
                norms.append(torch.stack([gradient.norm() for gradient in gradients]).norm().item())

    fit("32-true", tmp_path, extra=[Recorder()], gradient_clip_val=0.05)
    assert len(norms) > 50
    assert max(norms) <= 0.05 * 1.001
    assert min(norms) > 0.02  # clipped, and not by chance small


def test_a_subclass_brings_its_loss_its_data_and_its_optimizer(tmp_path):
    module = SmoothedLM(smoothing=0.2, adapter={"r": 4, "lora_alpha": 4})
    trainer = Trainer(
        accelerator="cpu",
        max_steps=40,
        default_root_dir=tmp_path,
        callbacks=[LocallyOptimalInit(), Retraction()],
        num_sanity_val_steps=0,
        **QUIET,
    )
    data = CountingData()
    trainer.validate(module, data, verbose=False)
    before = trainer.callback_metrics["val/loss"].item()
    trainer.fit(module, data)
    assert type(module.optimizers().optimizer).__name__ == "RiemannianSGD"
    assert trainer.callback_metrics["val/loss"].item() < 0.7 * before
    # the loss logged is the subclass's: label smoothing keeps it above the plain cross-entropy
    plain = trainer.callback_metrics["val/perplexity"].log().item()
    assert trainer.callback_metrics["val/loss"].item() > plain + 0.1
