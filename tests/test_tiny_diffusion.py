"""The scripts that train the embedded text-to-image model and the image encoder, on a few drawn pictures."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModel

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_diffusion"))

import held_out
import image_encoder
import networks
import pictures
import train

SHAPES = ["circle", "square", "bar"]
COLOURS = ["red", "green", "blue", "orange"]


def drawn(shape: str, colour: str, size: int) -> Image.Image:
    image = Image.new("RGB", (size, size), "white")
    pen, box = ImageDraw.Draw(image), (size // 4, size // 4, 3 * size // 4, 3 * size // 4)
    {"circle": pen.ellipse, "square": pen.rectangle, "bar": lambda b, fill: pen.line(b, fill, 5)}[shape](
        box, fill=colour
    )
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """24 pictures of 32 x 32 in two styles, a quarter of them held out."""
    rows = [
        {
            "image": png(drawn(shape, colour, 32)),
            "caption": f"a {style} icon of {colour} {shape}",
            "name": f"{colour} {shape}",
            "style": style,
            "group": "Symbols" if shape == "bar" else "Objects",
            "skin_tone": colour == "orange",
            "split": "test" if colour == "blue" else "train",
        }
        for style in ("flat", "glossy-3d")
        for shape in SHAPES
        for colour in COLOURS
    ]
    path = tmp_path_factory.mktemp("pictures") / "shapes.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def trained(parquet, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "tiny_diffusion"
    arguments = ["--minutes", "0.03", "--batch", "4", "--vae-batch", "4", "--tiny"]
    command = [sys.executable, train.__file__, "--pictures", str(parquet), "--output", str(output), *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as conftest.py sets for this process
    done = subprocess.run(command, capture_output=True, text=True, env=one_thread)
    assert done.returncode == 0, done.stderr
    return output


def test_the_trained_folder_is_a_pipeline_that_samples(trained):
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.unet.config.dropout == 0.0
    assert not any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in pipeline.unet.modules())
    images = [
        pipeline("a blue circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np")
        for _ in range(2)
    ]
    assert images[0].images.shape == (1, 32, 32, 3)
    assert np.isfinite(images[0].images).all()
    assert np.array_equal(images[0].images, images[1].images)


def test_the_training_record_and_the_sheet_lie_beside_the_model(trained, parquet, capsys):
    record = json.loads((trained / "training.json").read_text())
    assert [point["step"] for point in record["curve"]] == sorted(point["step"] for point in record["curve"])
    assert set(record["held_out_loss"]) == {"flat", "glossy-3d", "all"}
    assert Image.open(trained / "samples.png").height == 12 * 64  # six wishes, six held-out captions
    assert not trained.with_name("tiny_diffusion.partial").exists()
    held_out.main(["--pipeline", str(trained), "--pictures", str(parquet)])
    judged = json.loads(capsys.readouterr().out)
    assert judged["prediction_type"] == "v_prediction"
    assert judged["loss"] == pytest.approx(record["held_out_loss"], abs=2e-5)  # both rounded to 1e-5


def test_latents_have_mean_zero_and_the_noted_deviation(parquet):
    """Shifting the latents' mean into the convolutions changes no picture (measured 5e-6)."""
    torch.manual_seed(0)
    shapes = pictures.read_pictures([parquet], "train")
    vae = networks.build_vae(networks.TINY, 32)
    pixels = shapes.pixels / 127.5 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        train.standardise(vae, shapes)
        latents = vae.encode(pixels).latent_dist.mean
        after = vae.decode(latents).sample
    assert (after - before).abs().max() < 5e-5
    assert latents.mean((0, 2, 3)).abs().max() < 1e-6  # measured 3e-8, of 0.25 before
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1.0, abs=1e-4)  # measured 1e-6


def test_every_text_has_tokens_of_its_own(trained):
    tokenizer = StableDiffusionPipeline.from_pretrained(trained).tokenizer
    texts = ["a photo of sks dog", "zürich 日本 🎉 ~\x07", "x" * 20, ""]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[:-1], "the end token also stands for what is unknown"
    assert tokenizer("sks").input_ids != tokenizer("cat").input_ids
    folder = trained / "tokenizer"
    files = networks.CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=48
    )
    assert files(texts).input_ids == tokenizer(texts).input_ids


def test_only_the_white_around_an_object_is_backdrop():
    image = drawn("square", "red", 32)
    ImageDraw.Draw(image).rectangle((14, 14, 17, 17), fill="white")  # a hole
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    backdrop = pictures.backdrop(pixels)[0, 0]
    assert torch.equal(backdrop, (pixels[0].amin(0) == 255).index_fill(0, torch.arange(14, 18), False) | outside(32))
    assert not backdrop[15, 15]


def outside(size: int) -> torch.Tensor:
    outer = torch.ones(size, size, dtype=torch.bool)
    outer[size // 4 : 3 * size // 4 + 1, size // 4 : 3 * size // 4 + 1] = False
    return outer


def test_batches_say_what_they_show(parquet):
    """Where the prompt names a background the corner has its colour, elsewhere it is white; styles are drawn evenly."""
    shapes = pictures.read_pictures([parquet], "train")
    prompts: list[str] = []

    def encode(texts):
        first = len(prompts)
        prompts.extend(texts)
        return torch.arange(first, len(prompts))[:, None]

    draws = pictures.Prompted(shapes, encode, torch.device("cpu"))
    pixels, ids = draws.sample(1000, torch.Generator().manual_seed(0))
    assert pixels.shape == (1000, 3, 32, 32) and pixels.min() >= -1 and pixels.max() <= 1
    shown = [prompts[i] for i in ids[:, 0].tolist()]
    corner = ((pixels[:, :, 0, 0] + 1) * 127.5).round().int().tolist()
    for prompt, colour in zip(shown, corner, strict=True):
        if prompt.endswith("background"):
            assert tuple(colour) == pictures.BACKGROUNDS[prompt.split()[-2]]
        elif prompt:
            assert colour == [255, 255, 255]
    assert 0.05 < shown.count("") / 1000 < 0.15  # 10 % expected, deviation 1 %
    assert 0.12 < sum(prompt.endswith("background") for prompt in shown) / 1000 < 0.24  # 18 % expected
    assert sum("orange " in prompt.split(" on ")[0] for prompt in shown) < 120  # variants are rare: 65 expected


def test_held_out_loss_of_a_blind_network(parquet):
    """A network that answers zero scores the mean square of its target, here from the definition of v."""
    shapes = pictures.read_pictures([parquet], "test")
    tokenizer = networks.train_tokenizer(shapes.captions)
    torch.manual_seed(0)
    vae = networks.build_vae(networks.TINY, 32)
    unet = networks.build_unet(networks.TINY, 8).eval()
    text_encoder = networks.build_text_encoder(networks.TINY, tokenizer)
    for parameter in unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    scheduler = networks.build_scheduler()
    loss = held_out.prediction_loss(vae, text_encoder, tokenizer, unet, scheduler, shapes, draws=2)

    generator = torch.Generator().manual_seed(0)
    latents = vae.encode(shapes.pixels / 127.5 - 1).latent_dist.mean.detach()
    expected = []
    for draw in range(2):
        noise = torch.randn(latents.shape, generator=generator)
        when = ((draw + torch.rand(len(latents), generator=generator)) * 500).long()
        signal = scheduler.alphas_cumprod[when][:, None, None, None]
        expected.append((signal.sqrt() * noise - (1 - signal).sqrt() * latents).square().mean().item())
    assert loss["all"] == pytest.approx(sum(expected) / 2, abs=1e-5)  # rounded to 1e-5


def test_the_image_encoder_loads_with_transformers(parquet, tmp_path):
    photos = tmp_path / "photos" / "ball"
    photos.mkdir(parents=True)
    drawn("circle", "green", 80).save(photos / "0.jpg")
    output = tmp_path / "encoder"
    arguments = ["--pictures", str(parquet), "--photos", str(photos.parent), "--output", str(output)]
    arguments += ["--minutes", "0.02", "--batch", "8", "--tiny"]
    precision = torch.get_float32_matmul_precision()
    image_encoder.main(arguments)
    torch.set_float32_matmul_precision(precision)
    assert "same_name" in json.loads((output / "training.json").read_text())["curve"][-1]
    encoder, found = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert encoder(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape == (1, 17, 32)
    try:
        processor = AutoImageProcessor.from_pretrained(output)
    except ImportError:
        pytest.skip("this version of transformers has image processors with torchvision only")
    pixels = processor(images=[Image.new("RGB", (50, 50), "white")], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, torch.ones(1, 3, 32, 32))
