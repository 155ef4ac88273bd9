"""A run on images that is killed in the middle of an epoch goes on with the very batches it would have seen."""

import logging

import pytest
import torch
from drawn_images import captioned, save
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_rlora.data import CaptionedImageData, DreamBoothData

SIZES = [(64, 64), (128, 64), (64, 128), (70, 66), (130, 60), (64, 64), (66, 64), (90, 40), (64, 130), (64, 64)]


class Killed(Exception):
    pass


class Recorder(LightningModule):
    """Keeps the keys, prompts and pixels of all training batches."""

    def __init__(self, kill_at_step):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.kill_at_step = kill_at_step
        self.seen = []

    def training_step(self, batch, batch_idx):
        if self.global_step == self.kill_at_step:
            raise Killed
        self.seen.append((batch["key"], batch["prompt"], batch["pixel_values"]))
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, kill_at_step=None, resume=False):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = Recorder(kill_at_step)
    checkpoint = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=3, callbacks=[checkpoint])
    try:
        trainer.fit(module, data, ckpt_path=folder / "last.ckpt" if resume else None)
    except Killed:
        assert kill_at_step is not None
    return module.seen


def equal(one, two):
    return len(one) == len(two) and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True)
    )


@pytest.fixture(params=["captioned", "captioned, two workers", "DreamBooth"])
def make(request, tmp_path):
    common = {"random_crop": True, "flip": True, "batch_size": 2}
    if request.param == "DreamBooth":
        for number in range(5):
            save(tmp_path / "dog" / f"{number}.jpg", 96, 64)
            save(tmp_path / "class" / f"{number}.jpg", 64, 96)
        prompts = ["a {token} {class_name}", "the {token} {class_name}"]
        return lambda **options: DreamBoothData(
            str(tmp_path / "dog"),
            "dog",
            class_images=str(tmp_path / "class"),
            prompts=prompts,
            **{"size": 32, "repeats": 2, **common, **options},
        )
    folder = captioned(tmp_path / "images", SIZES)
    workers = 2 if "workers" in request.param else 0
    return lambda **options: CaptionedImageData(
        folder, **{"size": 64, "multiple": 16, "num_workers": workers, **common, **options}
    )


def test_resume(make, tmp_path):
    whole = fit(make(), tmp_path / "whole")
    epoch = len(whole) // 3
    assert epoch >= 5 and not equal(whole[:epoch], whole[epoch : 2 * epoch])
    for kill in (2, epoch, epoch + 3):
        first = fit(make(), tmp_path / str(kill), kill)
        assert equal(first, whole[:kill])
        assert equal(fit(make(), tmp_path / str(kill), resume=True), whole[kill:])


def test_other_images_on_resume_are_told(make, tmp_path):
    fit(make(), tmp_path / "run", 2)
    with pytest.warns(UserWarning, match=r"other training data than the checkpoint's \(seed changed\)"):
        fit(make(seed=1), tmp_path / "run", resume=True)
    fit(make(), tmp_path / "other", 2)
    with pytest.warns(UserWarning, match=r"other training data than the checkpoint's \(.*data changed\)"):
        fit(make(size=96), tmp_path / "other", resume=True)


def test_looking_at_coming_batches_takes_none_away(make, tmp_path):
    """LOI walks over the first batches before the first step."""

    class Looking(Recorder):
        def on_train_start(self):
            self.looked = [batch["key"] for batch, _ in zip(self.trainer.train_dataloader, range(2), strict=False)]

    module = Looking(None)
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=3, enable_checkpointing=False).fit(
        module, make()
    )
    assert module.looked == [key for key, *_ in module.seen[:2]]
