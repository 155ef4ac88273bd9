"""DINO and CLIP similarity at each validation, with tiny stand-ins for both models."""

import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from tiny_pipelines import batch, saved, text_config, tokenizer
from torch.utils.data import DataLoader
from toy_runs import ToyData, ToyModule
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPVisionConfig,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lightning_rlora import DreamBoothData, ImageSimilarity, Riemannion, TextToImage, UserError

PROMPTS = ["a photo of sks dog", "a red cat"]
DESCRIPTIONS = ["a photo of dog", "a red cat"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def picture(seed, size=(20, 24)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("similarity")
    saved(folder / "pipeline", "sd15")
    (folder / "photos").mkdir()
    for i in range(3):
        picture(i).save(folder / "photos" / f"{i}.png")
    (folder / "photos" / "notes.txt").write_text("no photo")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZES, image_size=16, patch_size=8, initializer_range=0.3)).save_pretrained(folder / "dino")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "dino")
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8, projection_dim=8)
    config = CLIPConfig(text_config=text_config(16).to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer()).save_pretrained(folder / "clip")
    return folder


def similarity(folder, **options):
    settings = {"dino": str(folder / "dino"), "clip": str(folder / "clip"), "num_inference_steps": 2, "seeds": [3, 4]}
    return ImageSimilarity(
        PROMPTS, **{"references": str(folder / "photos"), "descriptions": DESCRIPTIONS} | settings | options
    )


def fit(folder, callbacks, root):
    torch.manual_seed(0)
    module = TextToImage(
        str(folder / "pipeline"), {"r": 2, "lora_dropout": 0.2}, optimizer=lambda groups: Riemannion(groups, lr=0.1)
    )
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=root,
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    data = [DataLoader([batch(i)] * 2, batch_size=None, generator=torch.Generator()) for i in (0, 1)]
    trainer.fit(module, *data)
    return module, trainer.callback_metrics


def test_the_numbers_are_the_mean_cosines(folder, tmp_path):
    """Picture by picture in NumPy, with the models as transformers loads them."""
    module, metrics = fit(folder, [similarity(folder)], tmp_path)
    pictures = [module.sample([p], [seed], num_inference_steps=2)[0] for p in PROMPTS for seed in (3, 4)]
    dino, clip = ViTModel.from_pretrained(folder / "dino").eval(), CLIPModel.from_pretrained(folder / "clip").eval()
    look = ViTImageProcessor.from_pretrained(folder / "dino")
    processor = CLIPProcessor.from_pretrained(folder / "clip")

    def cosine(x, y):
        return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

    with torch.no_grad():

        def token(one):
            return dino(look(images=one, return_tensors="pt").pixel_values).last_hidden_state[0, 0].double().numpy()

        image = [cosine(token(one), token(picture(i))) for one in pictures for i in range(3)]
        text = []
        for one, words in zip(pictures, [DESCRIPTIONS[0]] * 2 + [DESCRIPTIONS[1]] * 2, strict=True):
            output = clip(**processor(images=one, text=words, return_tensors="pt"))
            text.append(cosine(output.image_embeds[0].double().numpy(), output.text_embeds[0].double().numpy()))
    assert len(set(text)) == 4 and np.std(image) > 1e-3
    # pictures sampled two at a time may differ in a pixel's last bit; measured 2e-6
    assert metrics["val/image_similarity"].item() == pytest.approx(np.mean(image), abs=1e-3)
    assert metrics["val/text_similarity"].item() == pytest.approx(np.mean(text), abs=1e-3)


def test_the_training_does_not_notice_and_checkpoints_hold_nothing_of_it(folder, tmp_path):
    plain, _ = fit(folder, [], tmp_path)
    compared, _ = fit(folder, [similarity(folder)], tmp_path)
    assert plain.state_dict().keys() == compared.state_dict().keys()
    assert all(torch.equal(x, y) for x, y in zip(plain.parameters(), compared.parameters(), strict=True))


def test_without_clip_there_is_no_text_similarity(folder, tmp_path):
    _, metrics = fit(folder, [similarity(folder, clip=None)], tmp_path)
    assert "val/image_similarity" in metrics and "val/text_similarity" not in metrics


def test_the_data_tell_what_to_draw_and_to_compare_with(folder, tmp_path):
    """The same number as with their prompt and their folder, a transparent photo among them."""
    photos = tmp_path / "photos"
    shutil.copytree(folder / "photos", photos)
    Image.new("RGBA", (24, 24), (250, 0, 0, 90)).save(photos / "clear.png")
    found = []
    for told in ({}, {"prompts": ["a photo of sks dog"], "references": str(photos)}):
        callback = ImageSimilarity(**told, dino=str(folder / "dino"), clip=None, num_inference_steps=2, seeds=[3])
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[callback])
        torch.manual_seed(0)
        data = DreamBoothData(str(photos), "dog", size=16, batch_size=2)
        trainer.validate(TextToImage(str(folder / "pipeline"), {"r": 2}), data, verbose=False)
        found.append(trainer.callback_metrics["val/image_similarity"])
    assert found[0] == found[1]


def test_bad_input(folder, tmp_path):
    with pytest.raises(UserError, match="at least one prompt"):
        ImageSimilarity([])
    with pytest.raises(UserError, match="2 prompts and 1 descriptions"):
        fit(folder, [similarity(folder, descriptions=["a dog"])], tmp_path)
    with pytest.raises(UserError, match="there is no folder 'nowhere'"):
        ImageSimilarity(PROMPTS, "nowhere")
    with pytest.raises(UserError, match="holds no image"):
        ImageSimilarity(PROMPTS, str(tmp_path))
    (tmp_path / "x.JPG").write_bytes(b"no photo")
    with pytest.raises(UserError, match=r"x\.JPG"):
        fit(folder, [similarity(folder, references=str(tmp_path))], tmp_path)
    with pytest.raises(UserError, match="cannot load 'nobody/nothing'"):
        fit(folder, [similarity(folder, clip="nobody/nothing")], tmp_path)
    with pytest.raises(UserError, match="needs prompts and references"):
        fit(folder, [similarity(folder, references=None)], tmp_path)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, logger=False, callbacks=[similarity(folder)])
    with pytest.raises(UserError, match="such as TextToImage, and not ToyModule"):
        trainer.fit(ToyModule(), datamodule=ToyData())
