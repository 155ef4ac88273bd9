"""A UNet's adapter in stock pipelines: same pictures, in a process that has never heard of this package."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from test_export import lora, shift
from tiny_pipelines import build, images

from lightning_rlora.adapters import export_adapter, find_pairs
from lightning_rlora.adapters.diffusers_format import DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS
from lightning_rlora.adapters.export import update_factors
from lightning_rlora.adapters.pairs import base_weight
from lightning_rlora.errors import UserError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNETS = ("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in")
PATTERNS = {"rank_pattern": {"to_q": 4, "mid_block.*to_k": 1}, "alpha_pattern": {"to_v": 7, "up_blocks.*to_q": 5}}
CASES = {
    "sd15": ("sd15", lora(*ATTENTION), False),
    "sd15-offset": ("sd15", lora(*ATTENTION), True),
    "sd2-rslora-offset": ("sd2", lora(*ATTENTION, use_rslora=True), True),
    "sd2-patterns": ("sd2", lora(*ATTENTION, **PATTERNS), False),
    "sd2-patterns-offset": ("sd2", lora(*ATTENTION, **PATTERNS), True),
    "sd15-everywhere": ("sd15", lora(*ATTENTION, *RESNETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"), False),
    "sdxl-everywhere-offset": ("sdxl", lora(*ATTENTION, *RESNETS, "proj_in", "ff.net.2"), True),
    "sdxl-dora": ("sdxl", lora(*ATTENTION, use_dora=True), False),
    "sd15-bias": ("sd15", lora("to_out.0", lora_bias=True), False),
}
NO_KOHYA = {"sdxl-dora", "sd15-bias"}

# one process for all cases, and for two adapters side by side
LOADER = """
import pathlib, sys, torch, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[2])
from tiny_pipelines import build, images
results = {}
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    for name in (None, "kohya_lora.safetensors"):
        if name is None or (folder / name).exists():
            pipeline = build(folder.name.split("-")[0])
            pipeline.load_lora_weights(folder, **({"weight_name": name} if name else {}))
            results[folder.name, name, "loaded"] = images(pipeline, [1, 2])
            pipeline.fuse_lora()
            results[folder.name, name, "fused"] = images(pipeline, [1, 2])
pipeline = build("sd2")
for name in ("sd2-patterns-offset", "sd2-rslora-offset"):
    pipeline.load_lora_weights(pathlib.Path(sys.argv[1]) / name, adapter_name=name)
pipeline.set_adapters(["sd2-patterns-offset", "sd2-rslora-offset"], [0.5, 1.0])
results["both"] = images(pipeline, [1, 2])
assert not any(name.startswith("lightning") for name in sys.modules)
torch.save(results, sys.argv[3])
"""


def trained(kind, config, *, offset):
    """A pipeline whose UNet has an adapter far from zero, on a shifted base or the pristine one."""
    pipeline = build(kind)
    model = get_peft_model(pipeline.unet, config).eval()
    generator = torch.Generator().manual_seed(1)

    def move(std):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(std * torch.randn(parameter.shape, generator=generator))

    move(0.1)
    if offset:
        shift(model)
        move(0.05)
    return pipeline, model


def by_hand(kind, *weighted_models):
    """Pictures of a pristine UNet to whose weights the dense changes were added."""
    pipeline = build(kind)
    layers = dict(pipeline.unet.named_modules())
    for weight, model in weighted_models:
        for pair in find_pairs(model):
            left, right = update_factors(pair)
            layer = layers[pair.name.removeprefix("base_model.model.")]
            layer.weight.data += weight * (left @ right).float().reshape(layer.weight.shape)
    return images(pipeline, [1, 2])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unets")
    models, ours = {}, {}
    for name, (kind, config, offset) in CASES.items():
        pipeline, models[name] = trained(kind, config, offset=offset)
        ours[name] = images(pipeline, [1, 2])
        assert export_adapter(models[name], folder / "adapters" / name) == 0
    tests = str(__file__).rpartition("/adapters/")[0]
    command = [sys.executable, "-c", LOADER, str(folder / "adapters"), tests, str(folder / "results.pt")]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    assert run.returncode == 0, run.stderr
    return folder / "adapters", models, ours, torch.load(folder / "results.pt")


@pytest.mark.parametrize("how", ["loaded", "fused"])
@pytest.mark.parametrize("file", [None, KOHYA_WEIGHTS])
@pytest.mark.parametrize("case", CASES)
def test_stock_pipelines_make_the_same_pictures(case, file, how, exported):
    folder, _, ours, results = exported
    if file is not None and case in NO_KOHYA:
        assert not (folder / case / KOHYA_WEIGHTS).exists()
        return
    assert (images(build(case.split("-")[0]), [1, 2]) - ours[case]).abs().max() > 0.05
    assert (results[case, file, how] - ours[case]).abs().max() < 1e-4  # of 1; measured at most 3e-6


@pytest.mark.parametrize("case", ["sd15-offset", "sd2-patterns-offset", "sdxl-everywhere-offset"])
def test_pictures_are_those_of_the_dense_change(case, exported):
    _, models, ours, _ = exported
    assert (by_hand(case.split("-")[0], (1.0, models[case])) - ours[case]).abs().max() < 1e-4  # measured 3e-6


def test_two_adapters_side_by_side_add_up(exported):
    _, models, _, results = exported
    weighted = [(0.5, models["sd2-patterns-offset"]), (1.0, models["sd2-rslora-offset"])]
    assert (results["both"] - by_hand("sd2", *weighted)).abs().max() < 1e-4  # measured 3e-6


def test_scaling_and_ranks_are_written_as_the_formats_want_them(exported):
    folder, models, *_ = exported
    for case, rank in (("sd15", 2), ("sd15-offset", 4)):
        pairs = {pair.name.removeprefix("base_model.model."): pair for pair in find_pairs(models[case])}
        state, kohya = load_file(folder / case / DIFFUSERS_WEIGHTS), load_file(folder / case / KOHYA_WEIGHTS)
        assert len(state) == 2 * len(pairs) and len(kohya) == 3 * len(pairs)
        for name, pair in pairs.items():
            change = torch.matmul(*update_factors(pair)).float()
            a, b = (state[f"unet.{name}.lora_{which}.weight"] for which in "AB")
            torch.testing.assert_close(b @ a, change, rtol=1e-4, atol=1e-6)  # of readers that know no alpha
            key = f"lora_unet_{name.replace('.', '_')}"
            down, up = kohya[f"{key}.lora_down.weight"], kohya[f"{key}.lora_up.weight"]
            assert len(a) == len(down) == rank
            torch.testing.assert_close(kohya[f"{key}.alpha"] / rank * up @ down, change, rtol=1e-4, atol=1e-6)
        assert kohya[f"{key}.alpha"] == (
            3 if case == "sd15" else 4
        )  # lora_alpha, or r where the factors hold the scale
        with safe_open(folder / case / DIFFUSERS_WEIGHTS, "pt") as file:
            assert f'"unet.r": {rank}' in file.metadata()["lora_adapter_metadata"]


def test_exports_replace_each_other_as_a_whole_and_truncate(tmp_path):
    _, model = trained("sd15", lora(*ATTENTION), offset=True)
    export_adapter(model, tmp_path / "adapter")
    error = export_adapter(model, tmp_path / "adapter", truncated=True)
    assert 0 < error < 1
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}
    state = load_file(tmp_path / "adapter" / DIFFUSERS_WEIGHTS)
    assert {len(value) for key, value in state.items() if "lora_A" in key} == {2}
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is not an adapter"):
        export_adapter(model, tmp_path / "adapter")


def test_what_the_formats_cannot_hold_is_left_to_pefts(tmp_path):
    config = LoraConfig(r=2, target_modules=list(ATTENTION), modules_to_save=["conv_out"])
    _, model = trained("sd15", config, offset=False)
    with pytest.warns(UserWarning, match="no pytorch_lora_weights.safetensors is written: .* not conv_out") as said:
        export_adapter(model, tmp_path / "adapter")
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }


def test_adapters_that_diffusers_put_on_are_exported_too(tmp_path):
    """A UNet adapted by diffusers' own add_adapter, which is no PeftModel."""
    pipeline = build("sd15")
    pipeline.unet.add_adapter(lora(*ATTENTION, init_lora_weights=False))
    export_adapter(pipeline.unet, tmp_path / "adapter")
    stock = build("sd15")
    stock.load_lora_weights(tmp_path / "adapter")
    assert (images(stock, [1]) - images(pipeline, [1])).abs().max() < 1e-4
    assert base_weight(find_pairs(pipeline.unet)[0]).shape == (16, 16)
