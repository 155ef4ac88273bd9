"""A base that FSDP shards beside a whole adapter: what it holds, what it sends, and what else works with it."""

from pathlib import Path

import pytest
import torch
from fits import STRATEGIES, TinyLM, distance, fit, identical
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from processes import launch
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_rlora.adapters import PiSSA, find_pairs, shard_base, track_offsets, wrap_base
from lightning_rlora.adapters.offset import get_offset
from lightning_rlora.callbacks import AdapterExport, AdapterInit, AdapterOnlyCheckpoint, SpectrumMonitor
from lightning_rlora.errors import UserError
from lightning_rlora.optim import Riemannion

NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
STRATEGIES["fsdp2 of Lightning"] = lambda: ModelParallelStrategy(process_group_backend="gloo")


class CountReductions(Callback):
    """Notes the sizes of what is reduced over the processes in training."""

    def __init__(self):
        self.sizes = []

    def on_train_start(self, trainer, pl_module):
        reduce = distributed.all_reduce

        def noted(tensor, *args, **kwargs):
            self.sizes.append(tensor.numel())
            return reduce(tensor, *args, **kwargs)

        distributed.all_reduce = noted


def traffic(strategy, folder):
    count = CountReductions()
    run = fit(strategy, 3, folder=folder, steps=4, accumulate=3, clip=0.1, callbacks=(count,))
    return run["held"], sum(p.numel() for p in run["trained"]), count.sizes


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_process_holds_its_part_of_the_base_and_sends_gradients_once_a_step(strategy, tmp_path):
    parameters = list(TinyLM().parameters())
    adapter = sum(p.numel() for p in parameters if p.requires_grad)
    parts = sum(-(-len(p) // 3) * p[0].numel() for p in parameters if not p.requires_grad)
    for held, trained, sizes in launch(3, traffic, strategy, tmp_path, folder=tmp_path):
        assert trained == adapter
        assert adapter < held <= adapter + parts < 0.6 * sum(p.numel() for p in parameters)
        assert sizes == 4 * [adapter]


class NoteBuffers(Callback):
    """Notes what DDP sends to the other processes in every forward pass."""

    def on_train_end(self, trainer, pl_module):
        trainer.model._assign_modules_buffers()
        self.sent = sum(buffer.numel() for buffer in trainer.model.modules_buffers)
        self.held = sum(buffer.numel() for buffer in pl_module.buffers())


def buffers(folder):
    note = NoteBuffers()
    fit("ddp", 2, folder=folder, steps=1, loi=True, callbacks=(note,))
    return note.sent, note.held


def test_ddp_sends_no_offset_of_the_base(tmp_path):
    for sent, held in launch(2, buffers, tmp_path, folder=tmp_path):
        assert sent == 0 < held


def half_precision(strategy, folder):
    return fit(strategy, 2, folder=folder, dtype=torch.bfloat16, loi=True, steps=10)


def test_a_half_precision_base_with_float32_adapters_is_trained_as_under_ddp(tmp_path):
    names = ("ddp", "fsdp1", "fsdp2")
    ddp, *others = (launch(2, half_precision, name, tmp_path, folder=tmp_path / name)[0] for name in names)
    for other in others:
        assert identical(ddp, other)
        assert all(torch.equal(x, y) for x, y in zip(ddp["bases"], other["bases"], strict=True))
        assert {p.dtype for p in other["trained"]} == {torch.float32} and other["bases"][0].dtype == torch.bfloat16


def shifted_between_passes(targets, checkpointing):
    """Losses and gradients of a model before and after its base is shifted, whole and sharded; what stays gathered."""
    distributed.init_process_group("gloo")
    found = []
    for sharded in (False, True):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2, tie_word_embeddings=False, **NO_DROPOUT)
        lm = GPT2LMHeadModel(config)
        model = get_peft_model(lm, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        pairs = find_pairs(model)
        track_offsets(pairs)
        if sharded:
            shard_base(model, DeviceMesh("cpu", [0, 1]))
        ids = torch.arange(12).view(2, 6)
        with torch.no_grad():
            losses = [model(input_ids=ids, labels=ids).loss]
        head = lm.lm_head
        gathered = not isinstance(getattr(head, "base_layer", head).weight, DTensor)
        for pair in pairs:
            get_offset(pair).subtract(9 * pair.b, pair.a)
        for _ in range(2):
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
        found.append((torch.stack(losses).detach(), [pair.b.grad for pair in pairs], gathered))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [["c_attn", "c_fc"], ["c_attn", "lm_head"]])
def test_the_root_stays_gathered_unless_it_is_adapted(targets, checkpointing, tmp_path):
    for whole, sharded in launch(2, shifted_between_passes, targets, checkpointing, folder=tmp_path):
        assert torch.allclose(whole[0], sharded[0], rtol=1e-6)
        assert abs(whole[0][1] - whole[0][0]) > 1e-4  # the shift is seen
        assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(whole[1], sharded[1], strict=True))
        assert sharded[2] == ("lm_head" not in targets)


def with_callbacks(strategy, count, folder):
    callbacks = (AdapterInit(PiSSA()), SpectrumMonitor(2), AdapterExport(str(folder / strategy)))
    return fit(strategy, count, folder=folder / "run", steps=4, dora=True, dtype=torch.float32, callbacks=callbacks)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_starts_exports_and_monitors_work_on_a_sharded_base(strategy, tmp_path):
    one, sharded = (
        launch(count, with_callbacks, name, count, tmp_path, folder=tmp_path / "results")[0]
        for name, count in (("one", 1), (strategy, 2))
    )
    found = distance(one, sharded)
    assert found < 1e-5, found
    assert (tmp_path / "run" / "spectrum.csv").is_file()
    saved, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", strategy))
    assert saved.keys() == other.keys()
    assert all(torch.allclose(saved[key], other[key], atol=1e-4) for key in saved)


def refused(folder):
    with pytest.raises(UserError, match=r"ModelParallelStrategy would shard the adapter.*use strategy fsdp2"):
        fit("fsdp2 of Lightning", 2, folder=folder)
    mesh = DeviceMesh("cpu", [0, 1])
    factors = [nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)])) for shape in [(3, 7), (9, 3)]]
    with pytest.raises(UserError, match=r"Riemannion takes whole factors.*DTensors.*FSDP2Strategy"):
        Riemannion(factors)
    model = TinyLM(torch.float32).model
    find_pairs(model)[0].layer.base_layer.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), False)
    with pytest.raises(UserError, match="cannot be sharded: use quantization 4bit, or strategy ddp"):
        shard_base(model, mesh)
    mixed = TinyLM(torch.float32)
    mixed.model.base_model.model.transformer.h[0].ln_1.bfloat16()
    with pytest.raises(UserError, match=r"FSDP1 cannot shard this base \(.*uniform dtype.*\): use strategy fsdp2"):
        wrap_base(mixed, device_id=torch.device("cpu"))


def test_what_cannot_be_sharded_is_refused(tmp_path):
    launch(2, refused, tmp_path, folder=tmp_path)


def project(strategy, folder):
    """A project of somebody else's, with a module of its own."""
    from lightning.pytorch import Trainer
    from loi_project import Project, loader, products

    class Sharded(Project):
        def configure_model(self):
            if strategy == "fsdp2":
                shard_base(self, self.trainer.strategy.mesh)

    def run(**options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {"strategy": strategy, "callbacks": [AdapterOnlyCheckpoint()], "default_root_dir": folder}
        return Trainer(accelerator="cpu", devices=2, **quiet | options), Sharded()

    trainer, module = run(max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(folder / "half.ckpt")
    trainer, module = run(max_steps=3)
    trainer.fit(module, loader(), ckpt_path=folder / "half.ckpt")
    return products(module)


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_modules_of_other_projects_are_sharded(strategy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "callbacks")
    first, second = launch(2, project, strategy, tmp_path, folder=tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(bool(x.any()) for x in first)
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in key or "manifold_offset" in key for key in state)
