"""A run killed with SIGKILL and resumed ends with the very weights and metrics of the uninterrupted one."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.cli import main

PROJECTS = Path(__file__).parent / "projects"
COMMON = [
    "fit",
    *("--model", "CausalLM", "--model.adapter", "{r: 4, lora_alpha: 4, lora_dropout: 0.1}"),
    *("--model.lr_scheduler", "LinearWithWarmup"),
    *("--data", "TextData", "--data.train", "embedded:python-topics", "--data.max_length", "48"),
    *("--data.batch_size", "2", "--trainer.accelerator", "cpu", "--trainer.accumulate_grad_batches", "2"),
    *("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "9", "--trainer.limit_val_batches", "2"),
    *("--trainer.val_check_interval", "4", "--trainer.log_every_n_steps", "2", "--trainer.gradient_clip_val", "1.0"),
    *("--checkpoint.every_n_train_steps", "2", "--ckpt_path", "last"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
METHODS = {
    "Riemannion with LOI": [
        *("--model.optimizer", "Riemannion", "--model.optimizer.lr", "0.02"),
        *("--trainer.callbacks+=LocallyOptimalInit", "--trainer.callbacks.power_steps=1"),
        "--trainer.callbacks+=Retraction",
        *("--spectrum.every_n_steps", "3"),
    ],
    "RiemannianSGD": [
        *("--model.optimizer", "RiemannianSGD", "--model.optimizer.lr", "0.5"),
        *("--model.optimizer.simulate_adam", "true", "--trainer.callbacks+=Retraction"),
    ],
}
KILLER = ["--trainer.callbacks+=killer.KillAt"]
# 9 batches an epoch make 5 steps (4 of two batches and one of one); checkpoints after steps 2, 4, 6, 8 and 10
MOMENTS = {
    "middle of the first epoch": ["--trainer.callbacks.batch=6"],
    "in the validation of a checkpoint's step": ["--trainer.callbacks.validation_at_step=4"],
    "middle of the second epoch and of an accumulation": ["--trainer.callbacks.batch=15"],
    "before the first checkpoint": ["--trainer.callbacks.batch=2"],
}


def result(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    files = {path.name: path.read_bytes() for path in folder.glob("*.csv")}
    return checkpoint["state_dict"], checkpoint["optimizer_states"][0]["state"], files


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if "LOI" in name else pytest.mark.slow) for name in METHODS]
)
def uninterrupted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    main([*COMMON, *METHODS[request.param], "--trainer.default_root_dir", str(folder)])
    return METHODS[request.param], result(folder)


@pytest.mark.parametrize(
    "moment",  # the second epoch's middle has all that the first one's has
    [pytest.param(name, marks=[pytest.mark.slow] if "first epoch" in name else []) for name in MOMENTS],
)
def test_a_killed_run_resumes_to_the_same_bits(moment, uninterrupted, tmp_path):
    method, (weights, state, files) = uninterrupted
    arguments = [*COMMON, *method, "--trainer.default_root_dir", str(tmp_path)]
    killed = subprocess.run(
        [sys.executable, "-m", "lightning_rlora.cli", *arguments, *KILLER, *MOMENTS[moment]],
        env=os.environ | {"PYTHONPATH": str(PROJECTS), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    main(arguments)
    resumed_weights, resumed_state, resumed_files = result(tmp_path)
    assert same(weights, resumed_weights)
    assert same(state, resumed_state)
    assert resumed_files.keys() == files.keys() >= {"metrics.csv"}
    for name, content in files.items():
        assert resumed_files[name] == content, name
