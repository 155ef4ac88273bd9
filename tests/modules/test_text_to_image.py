"""Text-to-image models of the three layouts: loss, latents, prompts, precisions, sampling, bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_pipelines import batch, build, images, saved
from torch.utils.data import DataLoader

from lightning_rlora import AdapterInit, RiemannianSGD, Riemannion, TextToImage, UserError, find_pairs
from lightning_rlora.adapters import EVA, PiSSA, export_adapter
from lightning_rlora.adapters.pairs import base_weight
from lightning_rlora.init import LoRAGA
from lightning_rlora.modules.checkpoint import load_module, save_pretrained
from lightning_rlora.modules.conditions import KEPT

KINDS = ["sd15", "sd2", "sdxl"]
ADAPTER = {"r": 2, "lora_alpha": 4}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: saved(folder / kind, kind) for kind in KINDS}


def quiet_trainer(folder, **options):
    settings = {"max_steps": 4, "num_sanity_val_steps": 0, "logger": False, "enable_checkpointing": False} | options
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def loader(*batches):
    # a generator of its own, or it would draw from the global one
    return DataLoader(list(batches), batch_size=None, generator=torch.Generator())


def trained(module):
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


OPTIMIZERS = {
    "Riemannion": {"optimizer": lambda groups: Riemannion(groups, lr=0.1)},
    "RiemannianSGD": {"optimizer": lambda groups: RiemannianSGD(groups, lr=0.3, simulate_adam=True)},
    "LoRA+": {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=2e-3), "lr_ratio": 16.0},
}


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, "Riemannion") for kind in KINDS), ("sd15", "RiemannianSGD"), ("sd2", "LoRA+")]
)
def test_the_loss_on_held_out_noise_falls(kind, method, folders, tmp_path):
    module = TextToImage(folders[kind], ADAPTER, **OPTIMIZERS[method])
    trainer = quiet_trainer(tmp_path, max_steps=15)
    data = loader(*[batch(0)] * 15)
    (before,) = trainer.validate(module, loader(batch(0)), verbose=False)
    trainer.fit(module, data)
    (after,) = trainer.validate(module, loader(batch(0)), verbose=False)
    assert after["val/loss"] < 0.95 * before["val/loss"]  # measured 0.81 to 0.93


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_diffusers_parts_by_hand(kind, folders):
    """Noise by the pipeline's scheduler, prompts and latents by its own encoders, with the same random numbers."""
    module, stock, data = TextToImage(folders[kind], ADAPTER).eval(), build(kind), batch(1)
    data["weight"] = torch.tensor([1.0, 0.3, 1.0, 0.3])
    torch.manual_seed(5)
    got = module.loss(data, module(data))

    torch.manual_seed(5)
    latents = torch.cat([stock.vae.encode(x).latent_dist.mean for x in data["pixel_values"].split(1)])
    latents = latents * stock.vae.config.scaling_factor
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    noise = torch.randn(latents.shape, generator=generator)
    times = torch.randint(1000, (4,), generator=generator)
    ids = stock.tokenizer(data["prompt"], padding="max_length", return_tensors="pt").input_ids
    if kind == "sdxl":
        one = stock.text_encoder(ids, output_hidden_states=True)
        two = stock.text_encoder_2(ids, output_hidden_states=True)
        hidden = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], -1)
        time_ids = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 4)
        more = {"added_cond_kwargs": {"text_embeds": two.text_embeds, "time_ids": time_ids}}
    else:
        hidden, more = stock.text_encoder(ids).last_hidden_state, {}
    noisy = stock.scheduler.add_noise(latents, noise, times)
    prediction = stock.unet(noisy, times, hidden, **more).sample
    target = stock.scheduler.get_velocity(latents, noise, times) if kind == "sd2" else noise
    errors = (prediction - target).square().flatten(1).mean(1)
    expected = (data["weight"] * errors).sum() / 4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)  # measured 0


@pytest.mark.parametrize("start", [PiSSA(), LoRAGA()], ids=lambda start: type(start).__name__)
def test_other_starts_leave_the_function_as_it_is(start, folders, tmp_path):
    init = AdapterInit(start)
    quiet_trainer(tmp_path, max_steps=1, callbacks=[init]).fit(TextToImage(folders["sd15"], ADAPTER), loader(batch(0)))
    assert init.done and init.loss_after == pytest.approx(init.loss_before, rel=1e-5)


def test_starts_made_for_texts_say_so(folders, tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[AdapterInit(EVA())])
    with pytest.raises(UserError, match="this start needs batches that are dictionaries with input_ids"):
        trainer.fit(TextToImage(folders["sd15"], ADAPTER), loader(batch(0)))


def test_min_snr_weights_enter_the_loss(folders):
    data, losses = batch(0), {}
    for gamma in (None, 5.0):
        module = TextToImage(folders["sd15"], ADAPTER, min_snr_gamma=gamma).eval()
        torch.manual_seed(0)
        output = module(data)
        losses[gamma] = module.loss(data, output)
    errors = (output.prediction - output.target).square().mean((1, 2, 3))
    snr = output.alpha_bar / (1 - output.alpha_bar)
    torch.testing.assert_close(losses[None], errors.mean())
    torch.testing.assert_close(losses[5.0], (errors * torch.minimum(snr, torch.tensor(5.0)) / snr).mean())


def test_sdxl_is_told_sizes_and_crops(folders):
    module, data = TextToImage(folders["sdxl"], ADAPTER), batch(0, size=2, height=16, width=24)
    data["original_size"] = torch.tensor([[40, 50], [60, 70]])
    data["crop_top_left"] = torch.tensor([[1, 2], [3, 4]])
    told = module.conditions(data)["added_cond_kwargs"]["time_ids"]
    assert told.tolist() == [[40, 50, 1, 2, 16, 24], [60, 70, 3, 4, 16, 24]]
    del data["original_size"], data["crop_top_left"]
    told = module.conditions(data)["added_cond_kwargs"]["time_ids"]
    assert told.tolist() == [[16, 24, 0, 0, 16, 24]] * 2


def test_prompts_are_encoded_once(folders, monkeypatch):
    module, seen = TextToImage(folders["sdxl"], ADAPTER), []
    encode = module.pipeline.encode_prompt
    monkeypatch.setattr(module.pipeline, "encode_prompt", lambda *args, **more: seen.append(1) or encode(*args, **more))
    with torch.inference_mode():
        first = module.conditions(batch(0))["encoder_hidden_states"]
    again = module.conditions(batch(1))["encoder_hidden_states"]  # other pictures, the same prompts
    assert torch.equal(again, first) and not again.is_inference() and len(seen) == 1
    assert torch.equal(again, encode(batch(0)["prompt"], do_classifier_free_guidance=False)[0])
    with torch.autocast("cpu", torch.bfloat16):
        module.conditions(batch(0))
    assert len(seen) == 2
    for number in range(KEPT):
        module.conditions(batch(0) | {"prompt": [f"a cat {'red ' * (number % 4)}{'dog ' * (number // 4)}"] * 4})
    assert len(seen) == 2 + KEPT
    module.conditions(batch(0))
    assert len(seen) == 3 + KEPT  # no more than so many are kept


def test_only_the_adapter_trains_and_only_it_is_saved(folders, tmp_path):
    module = TextToImage(folders["sdxl"], ADAPTER, dtype="bfloat16")
    pairs = find_pairs(module)
    assert len(pairs) == 32  # four projections of eight attention layers
    assert {name.rpartition(".lora_")[0].rpartition("attn")[2][2:] for name in trained(module)} == {
        *("to_q", "to_k", "to_v", "to_out.0")
    }
    assert all(pair.a.dtype == torch.float32 and base_weight(pair).dtype == torch.bfloat16 for pair in pairs)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader(batch(0)))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    keys = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert keys and all(".lora_" in key or ".manifold_offset." in key for key in keys)
    again = load_module(tmp_path / "x.ckpt")
    assert all(torch.equal(p, trained(module)[name]) for name, p in trained(again).items())


def test_convolutions_and_saved_adapters(folders, tmp_path):
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "conv1", "conv2", "time_emb_proj", "conv_shortcut"])
    module = TextToImage(folders["sd15"], config)
    assert {type(base_weight(pair)).__name__ for pair in find_pairs(module)} == {"Parameter"}
    assert any(pair.a.ndim == 4 for pair in find_pairs(module))
    quiet_trainer(tmp_path, max_steps=2).fit(module, loader(batch(0), batch(1)))
    export_adapter(module.model, tmp_path / "adapter")
    further = TextToImage(folders["sd15"], adapter_path=str(tmp_path / "adapter"))
    for one, other in zip(find_pairs(module), find_pairs(further), strict=True):
        assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
    with pytest.raises(UserError, match="does not fit the base model"):
        TextToImage(saved(tmp_path / "other", channels=(8, 16)), adapter_path=str(tmp_path / "adapter"))


def test_a_picture_is_encoded_once_and_the_same_in_every_company(folders):
    module, data = TextToImage(folders["sd15"], ADAPTER), batch(0)
    calls = []
    encode = module.vae.encode
    module.vae.encode = lambda x: calls.append(len(x)) or encode(x)
    pixels, keys = data["pixel_values"], data["key"]
    first = module.latents(pixels, keys)
    second = module.latents(pixels.flip(0), keys[::-1]).flip(0)
    assert torch.equal(first, second) and calls == [1] * 4
    fresh = TextToImage(folders["sd15"], ADAPTER)
    assert torch.equal(fresh.latents(pixels[2:3], keys[2:3]), first[2:3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fresh.latents(pixels[1:2], None), first[1:2])
    off = TextToImage(folders["sd15"], ADAPTER, cache_latents=False)
    assert torch.equal(off.latents(pixels, keys), first) and not off.latents._latents


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_latents_of_half_precision_models_are_float32(dtype, folders):
    module = TextToImage(folders["sd15"], ADAPTER, dtype=dtype)
    before = [p.clone() for p in module.vae.parameters()]
    latents = module.latents(batch(0)["pixel_values"], None)
    assert latents.dtype == torch.float32 and latents.isfinite().all()
    assert all(
        torch.equal(p, old) and p.dtype == old.dtype for p, old in zip(module.vae.parameters(), before, strict=True)
    )


def test_evaluation_is_the_same_each_time_and_draws_nothing_from_the_global_state(folders, tmp_path):
    module = TextToImage(folders["sd15"], ADAPTER, noise_offset=0.5)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        (result,) = quiet_trainer(tmp_path).validate(module, loader(batch(0), batch(1, size=2)), verbose=False)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(result["val/loss"])
    assert results[0] == results[1]
    losses = []
    for number, data in enumerate([batch(0), batch(1, size=2)]):
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            losses += [module.eval().loss(data, module(data, generator)).item() for _ in range(4)]
    assert results[0] == pytest.approx((4 * sum(losses[:4]) + 2 * sum(losses[4:])) / 24, rel=1e-5)
    (test,) = quiet_trainer(tmp_path).test(module, loader(batch(0), batch(1, size=2)), verbose=False)
    assert test["test/loss"] == results[0]


def test_processes_draw_other_noise_from_the_same_global_state(folders, monkeypatch):
    """Lightning seeds all processes alike, and a checkpoint holds the state of the first one only."""
    module, outputs, states = TextToImage(folders["sd15"], ADAPTER).eval(), [], []
    for rank in (0, 1, 0):
        monkeypatch.setattr(TextToImage, "global_rank", rank)
        torch.manual_seed(0)
        outputs.append(module(batch(0)))
        states.append(torch.get_rng_state())
    assert not torch.equal(outputs[0].target, outputs[1].target)
    assert not torch.equal(outputs[0].alpha_bar, outputs[1].alpha_bar)
    assert torch.equal(outputs[0].target, outputs[2].target)
    assert torch.equal(states[0], states[1]) and not torch.equal(module(batch(0)).target, outputs[0].target)


def test_gradient_checkpointing_changes_no_gradient(folders):
    gradients, data = [], batch(0)
    for flag in (False, True):
        module = TextToImage(folders["sd2"], ADAPTER, gradient_checkpointing=flag).train()
        generator = torch.Generator().manual_seed(0)
        for pair in find_pairs(module):
            torch.nn.init.normal_(pair.a, std=0.1, generator=generator)
            torch.nn.init.normal_(pair.b, std=0.1, generator=generator)
        calls = []
        resnet = module.pipeline.unet.mid_block.resnets[1]
        resnet.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(3)
        module.loss(data, module(data)).backward()
        gradients.append([pair.b.grad for pair in find_pairs(module)])
        assert len(calls) == 1 + flag
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("bf16-mixed", "float32"), ("bf16-mixed", "bfloat16"), ("16-mixed", "float32")],
)
def test_mixed_precision_trains(precision, dtype, folders, tmp_path):
    module = TextToImage(folders["sdxl"], ADAPTER, dtype=dtype, optimizer=lambda g: Riemannion(g, lr=0.1))
    trainer = quiet_trainer(tmp_path, max_steps=3, precision=precision)
    (before,) = trainer.validate(module, loader(batch(0)), verbose=False)
    trainer.fit(module, loader(*[batch(0)] * 3))
    (after,) = trainer.validate(module, loader(batch(0)), verbose=False)
    assert after["val/loss"] < before["val/loss"]
    assert len(module.sample(["a red cat"], [0], num_inference_steps=2)) == 1  # without autocast too
    assert all(p.dtype == torch.float32 for p in trained(module).values())


def test_samples_are_the_pipelines_own(folders):
    module = TextToImage(folders["sd2"], ADAPTER).train()
    stock = build("sd2")
    expected = (images(stock, [3, 4]).permute(0, 2, 3, 1) * 255).round()
    state = torch.get_rng_state()
    prompt = "a photo of sks dog"
    pictures = module.sample([prompt, prompt], [3, 4], num_inference_steps=3)
    assert torch.equal(torch.get_rng_state(), state) and module.model.training
    got = torch.stack(
        [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8).reshape(16, 16, 3) for p in pictures]
    )
    assert (got - expected).abs().max() <= 1  # of 255; measured 0
    one = module.sample([prompt], [4], num_inference_steps=3)
    assert max(abs(a - b) for a, b in zip(one[0].tobytes(), pictures[1].tobytes(), strict=True)) <= 1


def test_merging_gives_an_ordinary_pipeline(folders, tmp_path):
    module = TextToImage(folders["sdxl"], ADAPTER).eval()
    for pair in find_pairs(module):
        torch.nn.init.normal_(pair.b, std=0.3, generator=torch.Generator().manual_seed(0))
    ours = images(module.pipeline, [1])
    save_pretrained(tmp_path / "merged", *module.merged())
    from diffusers import StableDiffusionXLPipeline

    merged = images(StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged"), [1])
    assert (merged - images(build("sdxl"), [1])).abs().max() > 0.01
    torch.testing.assert_close(merged, ours, rtol=0, atol=1e-4)  # measured 1e-6


def test_long_prompts_are_refused_or_cut(folders):
    module, data = TextToImage(folders["sdxl"], ADAPTER), batch(0, size=2)
    data["prompt"] = ["a photo of a red cat", "a photo of " + "a red cat of " * 8]
    with pytest.raises(UserError, match=r"'a photo of a red cat .* has 37 tokens .* takes 12: shorten it"):
        module(data)
    with pytest.raises(UserError, match="has 37 tokens"):
        module.sample(data["prompt"], [0, 1])
    cut = TextToImage(folders["sdxl"], ADAPTER, truncate_prompts=True)
    assert cut.loss(data, cut(data)).isfinite()


def _edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _drop_weight(path):
    state = load_file(path)
    del state[min(state)]
    save_file(state, path)


UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
BROKEN = {
    "no pipeline": (lambda p: (p / "model_index.json").unlink(), "is no diffusers pipeline: a folder with"),
    "index that is no JSON": (lambda p: (p / "model_index.json").write_text("{"), "is no diffusers pipeline"),
    "no UNet": (
        lambda p: _edit(p / "model_index.json", lambda i: i.update(transformer=["diffusers", "X"], unet=[None, None])),
        r"has no UNet2DConditionModel to adapt \(it has .*transformer.*\)",
    ),
    "no VAE": (lambda p: _edit(p / "model_index.json", lambda i: i.pop("vae")), "has no vae"),
    "no UNet folder": (lambda p: shutil.rmtree(p / "unet"), "lacks its unet: there is no folder"),
    "no tokenizer": (lambda p: shutil.rmtree(p / "tokenizer"), "lacks its tokenizer"),
    "no weights": (lambda p: (p / UNET).unlink(), "cannot load the unet of the pipeline .* no file named"),
    "half the weights": (lambda p: (p / UNET).write_bytes((p / UNET).read_bytes()[:5000]), "cannot load the unet"),
    "half the text encoder": (lambda p: (p / TEXT).write_bytes(b"0" * 99), "cannot load the text_encoder"),
    "a weight less": (lambda p: _drop_weight(p / UNET), "the unet of .* lacks 1 weights, such as conv_in.bias"),
    "a text encoder's weight less": (lambda p: _drop_weight(p / TEXT), "the text_encoder of .* lacks 1 weights"),
    "broken configuration": (lambda p: (p / "unet/config.json").write_text("{"), "cannot load the unet"),
    "index that is no table": (lambda p: (p / "model_index.json").write_text("[]"), "model_index.json is no table"),
    "weights of another format only": (
        lambda p: (p / UNET).rename((p / UNET).with_suffix(".bin")),
        r"cannot load the unet .*\(only weights in safetensors are read\)",
    ),
    "unknown scheduler": (
        lambda p: _edit(p / "model_index.json", lambda i: i.update(scheduler=["diffusers", "NoSuchScheduler"])),
        "has no NoSuchScheduler, the scheduler of",
    ),
    "tokenizer without words": (
        lambda p: [file.unlink() for file in (p / "tokenizer").iterdir()],
        "the tokenizer beside the text_encoder of .* knows no words",
    ),
    "tokenizer without its length": (
        lambda p: _edit(p / "tokenizer/tokenizer_config.json", lambda c: c.update(model_max_length=99)),
        "gives up to 99 of .* tokens, and the text encoder takes 12",
    ),
    "predicts the picture": (
        lambda p: _edit(p / "scheduler/scheduler_config.json", lambda c: c.update(prediction_type="sample")),
        "predicts 'sample'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_pipelines_are_refused_in_one_line(case, folders, tmp_path):
    change, message = BROKEN[case]
    shutil.copytree(folders["sd15"], tmp_path / "pipeline")
    change(tmp_path / "pipeline")
    with pytest.raises(UserError, match=message) as refused:
        TextToImage(str(tmp_path / "pipeline"), ADAPTER)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("kind", "other"), [("sd15", "sdxl"), ("sdxl", "sd15")])
def test_a_unet_for_other_text_encoders_is_refused(kind, other, folders, tmp_path):
    shutil.copytree(folders[kind], tmp_path / "pipeline")
    shutil.copytree(Path(folders[other]) / "unet", tmp_path / "pipeline" / "unet", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"the UNet of .* takes (24|16) numbers .* they belong to different models"):
        TextToImage(str(tmp_path / "pipeline"), ADAPTER)


def test_other_bad_input_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="no such folder, and not to be had from the hub"):
        TextToImage("nobody/nothing", ADAPTER)
    inpainting = build("sd15")
    inpainting.unet.register_to_config(in_channels=9)
    inpainting.unet.conv_in = torch.nn.Conv2d(9, 16, 3, padding=1)
    inpainting.save_pretrained(tmp_path / "inpainting")
    with pytest.raises(UserError, match="takes 9 channels and its VAE gives 4"):
        TextToImage(str(tmp_path / "inpainting"), ADAPTER)
    for option, value in {"min_snr_gamma": 0.0, "noise_offset": -1.0, "evaluation_draws": 0}.items():
        with pytest.raises(UserError, match=option):
            TextToImage(folders["sd15"], ADAPTER, **{option: value})
    with pytest.raises(UserError, match="learns from pixel_values and prompt"):
        TextToImage(folders["sd15"], ADAPTER)({"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    with pytest.raises(UserError, match="with the callback SampleImages"):
        quiet_trainer(tmp_path).predict(TextToImage(folders["sd15"], ADAPTER), loader(batch(0)))
