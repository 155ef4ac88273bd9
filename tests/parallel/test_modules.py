"""The package's own modules on several processes."""

import pytest
import torch
from embedded_runs import PROMPT, question, rows, trainer
from lightning.pytorch.callbacks import Callback
from processes import launch
from torch.utils.data import DataLoader

from lightning_rlora import CausalLM, UserError


class Answers(Callback):
    """Lets the processes write answers of different lengths."""

    def on_test_start(self, trainer, pl_module):
        pl_module.model.generation_config.eos_token_id = None if trainer.global_rank else list(range(4096))


def evaluated(strategy, folder):
    module = CausalLM(adapter={"r": 2, "lora_alpha": 2}, max_new_tokens=4)
    run = trainer(strategy, 2, folder, max_steps=1, callbacks=[Answers()], use_distributed_sampler=False)
    run.fit(module, DataLoader(rows(2), batch_size=2), DataLoader(rows(6), batch_size=3))
    measured = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    run.test(module, DataLoader([question(run.global_rank)], batch_size=None), verbose=False)
    refusal = ""
    try:
        run.predict(module, DataLoader([PROMPT], batch_size=None))
    except UserError as error:
        refusal = str(error)
    return measured, module.answers, refusal


def test_a_sharded_model_is_measured_and_writes_answers(tmp_path):
    ddp, *sharded = (launch(2, evaluated, name, tmp_path, folder=tmp_path) for name in ("ddp", "fsdp1", "fsdp2"))
    assert ddp[0][0].keys() == {"val/loss", "val/perplexity", "val/accuracy"}
    for measured, answers, refusal in sharded[0] + sharded[1]:
        assert measured == pytest.approx(ddp[0][0], rel=1e-6)
        assert answers == ddp[0][1] and len(answers) == 2  # one of each process
        assert "not there to predict with" in refusal
    assert ddp[0][2] == ""


def written_alone(strategy, folder):
    """What `rlora test` does: the wrappers have seen no training."""
    torch.manual_seed(0)
    module = CausalLM(adapter={"r": 2, "lora_alpha": 2}, max_new_tokens=4)
    run = trainer(strategy, 2, folder, use_distributed_sampler=False)
    run.test(module, DataLoader([question(run.global_rank)], batch_size=None), verbose=False)
    return module.answers


def test_a_sharded_model_writes_answers_without_a_training(tmp_path):
    ddp, fsdp1 = (launch(2, written_alone, name, tmp_path, folder=tmp_path) for name in ("ddp", "fsdp1"))
    assert fsdp1[0] == ddp[0] and len(ddp[0]) == 2


def test_the_command_line_takes_its_own_strategy_for_fsdp(tmp_path):
    """Lightning's own refuses a CPU."""

    def fit():
        from lightning_rlora.cli import main

        data = ["--data", "TextData", "--data.train", "embedded:python-topics", "--data.max_length", "16"]
        run = ["--trainer.strategy", "fsdp", "--trainer.devices", "1", "--trainer.accelerator", "cpu"]
        limits = ["--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--data.batch_size", "2"]
        main(["fit", "--model", "CausalLM", *data, *run, *limits, "--trainer.default_root_dir", str(tmp_path)])

    launch(1, fit, folder=tmp_path / "process")
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
