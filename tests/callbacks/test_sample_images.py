"""Pictures while training: when, where, of what, and without a trace in the training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import DummyExperiment, Logger
from PIL import Image, ImageFont
from tiny_pipelines import batch, saved
from torch.utils.data import DataLoader
from toy_runs import ToyData, ToyModule

from lightning_rlora import Riemannion, SampleImages, TextToImage, UserError
from lightning_rlora.callbacks import RunRecord

PROMPTS = ["a photo of sks dog", "a red cat"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("pipeline"), "sd15")


class Loggers:
    """What Lightning's loggers of TensorBoard and of Weights & Biases take, as far as pictures go."""

    class Base(Logger):
        name = version = "fake"

        def __init__(self):
            self.seen = []

        @property
        def experiment(self):
            return DummyExperiment()

        def log_metrics(self, metrics, step=None):
            pass

        def log_hyperparams(self, *args, **kwargs):
            pass

    class TensorBoard(Base):
        @property
        def experiment(self):
            return self

        def add_image(self, tag, img_tensor, global_step=None, dataformats="CHW"):
            self.seen.append((tag, img_tensor.shape, global_step, dataformats))

    class WandB(Base):
        def log_image(self, key, images, step=None, **kwargs):
            self.seen.append((key, images[0].size, step))


def fit(folder, pipeline, callbacks, *, max_steps=5, loggers=False, **options):
    torch.manual_seed(0)
    module = TextToImage(pipeline, {"r": 2, "lora_dropout": 0.2}, optimizer=lambda groups: Riemannion(groups, lr=0.1))
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_steps=max_steps,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, DataLoader([batch(i % 2) for i in range(8)], batch_size=None))
    return module


def sampler(**options):
    return SampleImages(PROMPTS, **{"every_n_steps": 2, "seeds": [3, 4, 5], "num_inference_steps": 2} | options)


def test_grids_come_at_the_start_every_few_steps_and_at_the_end(tmp_path, pipeline):
    loggers = [Loggers.TensorBoard(), Loggers.WandB(), Loggers.Base()]
    module = fit(tmp_path, pipeline, [sampler(), RunRecord()], loggers=loggers)
    steps = [0, 2, 4, 5]
    files = sorted((tmp_path / "samples").glob("step*"))
    assert [path.name for path in files] == [f"step={step:06d}.png" for step in steps]
    pictures = [np.asarray(Image.open(path)) for path in files]
    assert all(picture.shape == (2 * 16, 3 * 16, 3) for picture in pictures)  # prompts down, seeds across
    assert not np.array_equal(pictures[0], pictures[-1])
    assert loggers[0].seen == [("samples", (32, 48, 3), step, "HWC") for step in steps]
    assert loggers[1].seen == [("samples", (48, 32), step) for step in steps]
    # the last grid is the trained model's, the first one the pristine pipeline's
    for picture, model in ((pictures[-1], module), (pictures[0], TextToImage(pipeline, {"r": 2}))):
        (one,) = model.sample(["a red cat"], [4], num_inference_steps=2)
        difference = picture[16:, 16:32].astype(int) - np.asarray(one).astype(int)
        assert abs(difference).max() <= 1  # of 255


def test_before_after_and_the_training_pictures_stand_side_by_side(tmp_path, pipeline):
    fit(tmp_path, pipeline, [sampler(seeds=[3, 4, 5, 6, 7, 8], every_n_steps=None)])
    picture = np.asarray(Image.open(tmp_path / "samples/before_after.png"))
    before, after = (np.asarray(Image.open(tmp_path / f"samples/step={step:06d}.png")) for step in (0, 5))
    assert picture.shape == (16 + 32, 2 * (96 + 8) + 64, 3)  # captions above, gaps between
    assert np.array_equal(picture[16:, :96], before)
    assert np.array_equal(picture[16:, 104:200], after)
    for i, pixels in enumerate(batch(0)["pixel_values"]):  # four of them
        top, left = 16, 208 + 16 * i
        shown = picture[top : top + 16, left : left + 16] / 127.5 - 1
        assert np.abs(shown - pixels.permute(1, 2, 0).numpy()).max() < 0.5 / 127.5 + 1e-6


def test_a_caption_is_not_cut_where_pictures_are_small(tmp_path, pipeline):
    fit(tmp_path, pipeline, [sampler(seeds=[3], every_n_steps=None)])
    width = Image.open(tmp_path / "samples/before_after.png").width
    assert width > 2 * 8 + sum(ImageFont.load_default().getlength(t) for t in ("after 5 steps", "trained on"))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_training_does_not_notice(precision, tmp_path, pipeline):
    options = {"precision": precision, "accumulate_grad_batches": 2, "max_steps": 3}
    plain = fit(tmp_path / "plain", pipeline, [], **options)
    sampled = fit(tmp_path / "sampled", pipeline, [sampler(every_n_steps=1)], **options)
    assert len(list((tmp_path / "sampled/samples").glob("step*"))) == 4
    pairs = zip(plain.parameters(), sampled.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_start_and_the_end_only(tmp_path, pipeline):
    fit(tmp_path, pipeline, [sampler(every_n_steps=None)], max_steps=3)
    names = {"step=000000.png", "step=000003.png", "trained_on.png", "before_after.png"}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == names


def test_an_earlier_runs_pictures_are_set_aside_with_it(tmp_path, pipeline):
    fit(tmp_path, pipeline, [sampler(), RunRecord()], max_steps=3)
    fit(tmp_path, pipeline, [sampler(every_n_steps=None), RunRecord()], max_steps=1)
    assert {path.name for path in (tmp_path / "samples").glob("step*")} == {"step=000000.png", "step=000001.png"}
    assert len(list((tmp_path / "previous/1/samples").glob("step*"))) == 3


def test_a_trial_run_leaves_nothing(tmp_path, pipeline):
    fit(tmp_path, pipeline, [sampler()], fast_dev_run=True)
    assert not (tmp_path / "samples").exists()


def test_bad_input(tmp_path):
    for options in ({"prompts": []}, {"seeds": []}, {"every_n_steps": 0}, {"num_inference_steps": 0}):
        with pytest.raises(UserError, match="SampleImages"):
            SampleImages(**{"prompts": PROMPTS} | options)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[sampler()], max_steps=1)
    with pytest.raises(UserError, match="such as TextToImage, and not ToyModule"):
        trainer.fit(ToyModule(), datamodule=ToyData())
    assert not Path(tmp_path, "samples").exists()


def test_prompts_are_looked_at_before_training(tmp_path, pipeline):
    with pytest.raises(UserError, match="shorten it"):
        fit(tmp_path, pipeline, [RunRecord(), SampleImages(["dog " * 20])])
    assert not list(tmp_path.iterdir())
