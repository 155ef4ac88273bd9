"""The text-to-image model in the package: its size, its card, and an adapter of it in a stock pipeline."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from lightning_rlora import TextToImage, find_pairs
from lightning_rlora.adapters import export_adapter, subtract_start, track_offsets, write_point
from lightning_rlora.assets import resolve
from lightning_rlora.geometry import Point

FOLDER = Path(resolve("embedded:tiny-diffusion"))
PROMPT, SEEDS, STEPS = "a photo of sks robot", [3, 4], 4

STOCK = f"""
import sys, numpy, torch
from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({str(FOLDER)!r})
pipeline.load_lora_weights(sys.argv[1])
images = pipeline(["{PROMPT}"] * {len(SEEDS)}, generator=[torch.Generator().manual_seed(seed) for seed in {SEEDS}],
                  num_inference_steps={STEPS}, output_type="np").images
assert "lightning_rlora" not in sys.modules
numpy.save(sys.argv[2], images)
"""


def test_the_folder_is_small_and_its_card_says_what_the_record_says():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(sizes) < 25e6
    record, card = json.loads((FOLDER / "training.json").read_text()), (FOLDER / "README.md").read_text()
    for name in ("held_out_loss", "seen_loss"):
        assert f"{record[name]['all']:.3f}" in card
    assert f"{record['held_out_psnr']:.1f} dB" in card
    assert f"{sum(record['parameters'].values()) / 1e6:.1f} million" in card


@torch.no_grad()
def test_an_adapter_makes_the_same_images_in_a_stock_process(tmp_path):
    targets = ["to_q", "to_out.0", "ff.net.2", "conv1"]
    module = TextToImage("embedded:tiny-diffusion", {"r": 4, "target_modules": targets})
    pairs = find_pairs(module)
    track_offsets(pairs)
    generator = torch.Generator().manual_seed(0)
    for size in (1.0, 2.0):  # a start that the base is shifted by, and another point
        for pair in pairs:
            m, n, r = pair.shape
            u, v = (torch.linalg.qr(torch.randn(k, r, generator=generator)).Q for k in (m, n))
            write_point(pair, Point(u, torch.full((r,), size), v))
            if size == 1.0:
                subtract_start(pair)
    options = {"num_inference_steps": STEPS, "output_type": "np"}
    ours = module.pipeline([PROMPT] * 2, generator=[torch.Generator().manual_seed(s) for s in SEEDS], **options).images
    export_adapter(module.model, tmp_path / "adapter")
    command = [sys.executable, "-c", STOCK, str(tmp_path / "adapter"), str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stock = np.load(tmp_path / "images.npy")
    base = StableDiffusionPipeline.from_pretrained(FOLDER)
    base.set_progress_bar_config(disable=True)
    plain = base([PROMPT], generator=torch.Generator().manual_seed(SEEDS[0]), **options).images
    assert np.abs(ours[:1] - plain).max() > 0.1
    assert np.abs(stock - ours).max() < 1e-3  # measured 3e-6
