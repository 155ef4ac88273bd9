"""The causal language model: its metrics, batches, options and checkpoints."""

import itertools
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from peft import LoraConfig
from torch.nn import functional as F
from torch.optim.lr_scheduler import ConstantLR
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from lightning_rlora import CausalLM, Riemannion, UserError, WhitenedRiemannion, find_pairs
from lightning_rlora.adapters import export_adapter, get_offset
from lightning_rlora.adapters.pairs import base_weight
from lightning_rlora.assets import resolve
from lightning_rlora.modules.base_model import load_tokenizer
from lightning_rlora.modules.checkpoint import load_module, save_pretrained
from lightning_rlora.modules.packing import check_packing
from lightning_rlora.optim import CosineWithWarmup, LinearWithWarmup, PolynomialWithWarmup

ADAPTER = {"r": 4, "lora_alpha": 8}


def make_batch(seed, rows=2, length=24):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 4096, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : 4 + seed] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def quiet_trainer(tmp_path, **options):
    options = {"max_steps": 3, "num_sanity_val_steps": 0} | options
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False} | options,
    )


def test_metrics_are_those_of_all_labelled_tokens_together(tmp_path):
    module = CausalLM(adapter=ADAPTER)
    batches = [make_batch(seed) for seed in range(3)]
    trainer = quiet_trainer(tmp_path)
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)
    losses, hits = [], []
    module.eval()
    with torch.no_grad():
        for batch in batches:
            logits = module.model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
            targets = batch["labels"][:, 1:].flatten()
            kept = targets != -100
            losses.append(F.cross_entropy(logits[kept].double(), targets[kept], reduction="none"))
            hits.append(logits[kept].argmax(-1) == targets[kept])
    loss = torch.cat(losses).mean()
    # float32 against float64; measured 1e-7
    torch.testing.assert_close(trainer.callback_metrics["val/loss"].double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(trainer.callback_metrics["val/perplexity"].double(), loss.exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(trainer.callback_metrics["val/accuracy"], torch.cat(hits).float().mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_adapter_is_float32_and_the_base_frozen(dtype):
    module = CausalLM(adapter=ADAPTER, dtype=dtype)
    for pair in find_pairs(module):
        assert pair.a.dtype == pair.b.dtype == torch.float32
        assert base_weight(pair).dtype == getattr(torch, dtype)
        assert not base_weight(pair).requires_grad


def test_a_peft_config_and_its_fields_are_the_same_thing(tmp_path):
    by_config = CausalLM(adapter=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    by_fields = CausalLM(adapter={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]})
    assert [p.name for p in find_pairs(by_config)] == [p.name for p in find_pairs(by_fields)]
    assert len(find_pairs(by_config)) == 12
    trainer = quiet_trainer(tmp_path)
    trainer.fit(by_config, DataLoader([make_batch(0)] * 3, batch_size=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = load_module(tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(by_config.eval()(make_batch(1)).logits, again(make_batch(1)).logits)
    assert len(find_pairs(CausalLM(adapter=ADAPTER))) == 42  # all-linear: seven projections of six layers


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_bases_train_on_the_cpu(quantization, tmp_path):
    pytest.importorskip("bitsandbytes")
    module = CausalLM(adapter=ADAPTER, quantization=quantization, optimizer=lambda g: Riemannion(g, lr=0.05))
    batch = make_batch(0)
    trainer = quiet_trainer(tmp_path, max_steps=6, num_sanity_val_steps=1)  # evaluated before it is trained
    losses = []
    module.loss = lambda batch, output: losses.append(output.loss.item()) or output.loss
    loader = DataLoader([batch] * 6, batch_size=None)
    trainer.fit(module, loader, loader)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize(("gpus", "device"), [(4, 2), (1, 0), (0, "cpu")])
def test_every_process_quantises_on_its_own_device(gpus, device, monkeypatch):
    pytest.importorskip("bitsandbytes")
    asked = []

    def from_pretrained(*args, **options):
        asked.append(options["device_map"])
        raise OSError("nothing is loaded")

    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UserError, match="cannot load"):
        CausalLM(adapter=ADAPTER, quantization="4bit")
    assert asked == [{"": device}]


def test_what_is_not_quantised_has_the_dtype_asked_for():
    """In float32, as PEFT's preparation for k-bit training leaves it, activations would take twice the memory."""
    pytest.importorskip("bitsandbytes")
    module = CausalLM(adapter=ADAPTER, quantization="4bit", dtype="bfloat16")
    kinds = {p.dtype for p in module.model.parameters() if not p.requires_grad and type(p).__name__ != "Params4bit"}
    assert kinds == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        hidden = module.model(**make_batch(0), output_hidden_states=True).hidden_states
    assert {x.dtype for x in hidden} == {torch.bfloat16}


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        module = CausalLM(adapter=ADAPTER, gradient_checkpointing=flag).train()
        for pair in find_pairs(module):
            torch.nn.init.normal_(pair.b, std=0.1, generator=torch.Generator().manual_seed(0))
            torch.nn.init.normal_(pair.a, std=0.1, generator=torch.Generator().manual_seed(1))
        module(make_batch(1)).loss.backward()
        gradients.append([pair.b.grad for pair in find_pairs(module)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-4, atol=1e-7)


def test_a_saved_adapter_is_trained_further(tmp_path):
    module = CausalLM(adapter=ADAPTER)
    for pair in find_pairs(module):
        torch.nn.init.normal_(pair.b, std=0.1, generator=torch.Generator().manual_seed(0))
    export_adapter(module.model, tmp_path / "adapter")
    further = CausalLM(adapter_path=str(tmp_path / "adapter"))
    batch = make_batch(2)
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(batch).logits, further.eval()(batch).logits, rtol=0, atol=1e-5)
    assert all(pair.a.requires_grad and pair.b.requires_grad for pair in find_pairs(further))
    with pytest.raises(UserError, match="not both"):
        CausalLM(adapter=ADAPTER, adapter_path=str(tmp_path / "adapter"))


@pytest.mark.parametrize("schedule", [LinearWithWarmup, CosineWithWarmup])
def test_the_schedule_learns_the_length_of_the_run(schedule, tmp_path):
    module = CausalLM(
        adapter=ADAPTER,
        optimizer=lambda groups: Riemannion(groups, lr=1.0),
        lr_scheduler=lambda optimizer: schedule(optimizer, warmup=0.5),
    )
    rates = []
    module.on_before_optimizer_step = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    quiet_trainer(tmp_path, max_steps=4).fit(module, DataLoader([make_batch(0)] * 4, batch_size=None))
    assert rates[0] == pytest.approx(1 / 3)  # two steps of warm-up: 1/3, 2/3; then from 1 down
    assert rates[1] == pytest.approx(2 / 3)
    assert rates[2] == pytest.approx(1.0)
    assert rates[3] == pytest.approx(0.5)  # half-way, on a line and on half a cosine alike


def test_the_trainers_clipping_becomes_that_of_the_tangent_vector(tmp_path):
    module = CausalLM(adapter=ADAPTER)
    trainer = quiet_trainer(tmp_path, gradient_clip_val=0.25)
    trainer.fit(module, DataLoader([make_batch(0)] * 3, batch_size=None))
    assert trainer.optimizers[0].max_tangent_norm == 0.25
    module = CausalLM(adapter=ADAPTER, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    trainer = quiet_trainer(tmp_path, gradient_clip_val=0.25)
    norms = []
    module.on_before_zero_grad = lambda optimizer: norms.append(
        torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None] or [torch.tensor(0.0)]).norm()
    )
    trainer.fit(module, DataLoader([make_batch(0)] * 3, batch_size=None))
    assert max(norms) <= 0.25 * 1.001


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    module = CausalLM(adapter=ADAPTER)
    module.loss = lambda batch, output: output.loss * float("inf")
    with pytest.raises(UserError, match="lower the learning rate"):
        quiet_trainer(tmp_path).fit(module, DataLoader([make_batch(0)], batch_size=None))


def test_generation_continues_each_prompt_of_a_padded_batch(tmp_path):
    module = CausalLM(adapter=ADAPTER, max_new_tokens=6)
    module.tokenizer.padding_side = "left"
    prompts = ["It was a dark", "The old man looked at the sea and"]
    batch = dict(module.tokenizer(prompts, return_tensors="pt", padding=True)) | {"prompt": prompts}
    batch.pop("token_type_ids", None)
    (results,) = quiet_trainer(tmp_path).predict(module, DataLoader([batch], batch_size=None))
    for prompt, result in zip(prompts, results, strict=True):
        alone = module.tokenizer(prompt, return_tensors="pt").input_ids
        for _ in range(6):  # greedy by hand, without a cache or padding
            with torch.no_grad():
                new = module.model(input_ids=alone).logits[:, -1].argmax(-1, keepdim=True)
            alone = torch.cat([alone, new], 1)
        expected = module.tokenizer.decode(alone[0], skip_special_tokens=True)
        assert result == {"prompt": prompt, "completion": expected.removeprefix(prompt)}


def test_a_checkpoint_holds_no_base_and_comes_back_whole(tmp_path):
    module = CausalLM(adapter=ADAPTER)
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, DataLoader([make_batch(seed) for seed in range(3)], batch_size=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    keys = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert not any(key.endswith("base_layer.weight") or "embed_tokens" in key for key in keys)
    again = load_module(tmp_path / "a.ckpt")
    batch = make_batch(7)
    with torch.no_grad():
        assert torch.equal(module.eval()(batch).logits, again(batch).logits)


def test_a_module_from_a_checkpoint_can_be_trained_afresh_with_another_optimizer(tmp_path):
    module = CausalLM(adapter=ADAPTER, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, DataLoader([make_batch(0)] * 3, batch_size=None))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    states = []
    loaded.on_before_backward = lambda loss: states.append(torch.get_rng_state())
    loader = DataLoader([make_batch(0)] * 3, batch_size=None, generator=torch.Generator())
    torch.manual_seed(11)
    quiet_trainer(tmp_path).fit(loaded, loader)
    assert torch.equal(states[0], torch.manual_seed(11).get_state())  # the checkpoint's random state is not this run's
    with pytest.raises(UserError, match="AdamW"):
        quiet_trainer(tmp_path).fit(
            CausalLM(adapter=ADAPTER), DataLoader([make_batch(0)] * 3, batch_size=None), ckpt_path=tmp_path / "a.ckpt"
        )


def test_other_architectures(tmp_path):
    """GPT-2 with its transposed weights and a Llama with tied embeddings, as folders made from configurations."""
    tokenizer = load_tokenizer("embedded:tiny-lm", trust_remote_code=False)
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
        "llama": LlamaForCausalLM(
            LlamaConfig(
                vocab_size=4096,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        ),
    }
    for name, model in models.items():
        save_pretrained(tmp_path / name, model, tokenizer)
        module = CausalLM(base=str(tmp_path / name), adapter=ADAPTER, optimizer=lambda g: Riemannion(g, lr=0.1))
        quiet_trainer(tmp_path, max_steps=3).fit(module, DataLoader([make_batch(0)] * 3, batch_size=None))
        assert all(get_offset(pair) is not None for pair in find_pairs(module))
        assert all(torch.isfinite(p).all() for p in module.parameters())
    with pytest.raises(UserError, match="not empty"):
        save_pretrained(tmp_path / "gpt2", models["gpt2"], tokenizer)


@pytest.mark.parametrize("training", [True, False])
def test_architectures_that_let_packed_documents_see_each_other_are_refused(training):
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=48)).train(training)
    check_packing(llama)
    assert llama.training == training
    opt = OPTForCausalLM(OPTConfig(**small, ffn_dim=48, word_embed_proj_dim=32)).train(training)
    with pytest.raises(UserError, match="packing to false"):
        check_packing(opt)
    assert opt.training == training


def test_the_embedded_model_is_small_and_says_what_it_is():
    from pathlib import Path

    folder = Path(resolve("embedded:tiny-lm"))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    assert "public-domain" in (folder / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    with pytest.raises(UserError, match="embedded:tiny-lm"):
        resolve("embedded:nothing")


def test_data_of_another_kind_are_refused():
    with pytest.raises(UserError, match="learns from input_ids, which the data do not give"):
        CausalLM(adapter={"r": 2})({"pixel_values": torch.zeros(1, 3, 8, 8)})


def test_manual_optimization_gets_no_schedule_that_nobody_steps(tmp_path):
    class Manual(CausalLM):
        def training_step(self, batch, batch_idx):
            self.optimizers().zero_grad()
            self.manual_backward(self.loss(batch, self(batch)))
            self.optimizers().step()

    module = Manual(adapter=ADAPTER)
    module.automatic_optimization = False
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(module, DataLoader([make_batch(0)] * 2, batch_size=None))
    assert trainer.lr_scheduler_configs == [] and trainer.optimizers[0].param_groups[0]["lr"] == 0.2


def test_a_schedule_without_a_length_is_refused_before_callbacks_begin(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.repeat(make_batch(0))

    begin = LambdaCallback(on_train_start=lambda *_: pytest.fail("a callback, which may be a costly start, has begun"))
    trainer = quiet_trainer(tmp_path, max_steps=-1, max_epochs=1, callbacks=[begin])
    with pytest.raises(UserError, match=r"length of the run.*ConstantLR"):
        trainer.fit(CausalLM(adapter=ADAPTER), DataLoader(Endless(), batch_size=None))


@pytest.mark.parametrize(
    "first, then, message",
    [
        (
            None,
            partial(PolynomialWithWarmup, momentum=(0.7, 0.9)),
            "schedule LinearWithWarmup, .* PolynomialWithWarmup",
        ),
        (PolynomialWithWarmup, None, "schedule PolynomialWithWarmup, .* LinearWithWarmup"),
        (None, partial(ConstantLR, factor=1), "schedule LinearWithWarmup, .* ConstantLR"),
    ],
)
def test_a_run_goes_on_with_its_own_schedule_only(first, then, message, tmp_path):
    data = DataLoader([make_batch(0)] * 4, batch_size=None)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(CausalLM(adapter=ADAPTER, lr_scheduler=first), data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(UserError, match=message):
        quiet_trainer(tmp_path, max_steps=2).fit(
            CausalLM(adapter=ADAPTER, lr_scheduler=then), data, ckpt_path=tmp_path / "one.ckpt"
        )


def test_a_run_without_a_schedule_is_not_resumed_with_one(tmp_path):
    constant = partial(ConstantLR, factor=1)
    data = DataLoader([make_batch(0)] * 4, batch_size=None)
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(CausalLM(adapter=ADAPTER, lr_scheduler=constant), data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    del saved["schedule_names"]
    torch.save(saved | {"lr_schedulers": []}, tmp_path / "none.ckpt")  # as one of an earlier version without schedule
    with pytest.raises(UserError, match=r"without a schedule.*ConstantLR"):
        quiet_trainer(tmp_path, max_steps=2).fit(CausalLM(adapter=ADAPTER), data, ckpt_path=tmp_path / "none.ckpt")
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(CausalLM(adapter=ADAPTER, lr_scheduler=constant), data, ckpt_path=tmp_path / "none.ckpt")
    assert trainer.global_step == 2  # which is what the refusal advises


def test_a_rank_is_all_that_must_be_set(tmp_path):
    module = CausalLM(adapter={"r": 4})
    trainer = quiet_trainer(tmp_path, max_steps=20)
    trainer.fit(module, DataLoader([make_batch(seed) for seed in range(20)], batch_size=None))
    (optimizer,) = trainer.optimizers
    (config,) = trainer.lr_scheduler_configs
    assert isinstance(optimizer, WhitenedRiemannion)
    assert all(unit > 0 for group in optimizer.param_groups for unit in group["units"])
    assert isinstance(config.scheduler, LinearWithWarmup) and config.interval == "step"
    assert config.scheduler.total_steps == 20 and config.scheduler.warmup == 0.05
    assert config.scheduler.get_last_lr()[0] == 0
