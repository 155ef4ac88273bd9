"""The command line: what it does with good input, and one clear line and status 2 for bad input."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.cli import main

FIT = [
    "fit",
    *("--model", "CausalLM", "--model.adapter", "{r: 4, lora_alpha: 4}"),
    *("--data", "TextData", "--data.train", "data.jsonl", "--data.max_length", "32", "--data.batch_size", "2"),
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "run"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
LOI = ["--trainer.callbacks", "[{class_path: LocallyOptimalInit}]"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a small data set."""
    monkeypatch.chdir(tmp_path)
    records = [{"text": f"The {n}th of the many sentences that tell a number.", "n": n} for n in range(24)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def run(arguments, capsys):
    """Run the command line; return its exit status and what it wrote to the two streams."""
    status = 0
    try:
        main(arguments)
    except SystemExit as end:
        status = end.code
    out, err = capsys.readouterr()
    return status, out, err


def fails(arguments, capsys, *words):
    """Expect exit status 2, one line of error with these words, and no traceback."""
    status, _, err = run(arguments, capsys)
    lines = [line for line in err.splitlines() if "error:" in line]
    assert status == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


BAD_INPUT = {
    "an option that torch refuses": (
        ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr=-1"],
        ["optimizer refuses", "learning rate: -1"],
    ),
    "an optimizer that LoRA+ has no rates for": (
        ["--model.optimizer", "torch.optim.LBFGS", "--model.lr_ratio", "4"],
        ["optimizer refuses", "LBFGS"],
    ),
    "a schedule that torch refuses": (
        ["--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr", "0.1"],
        ["scheduler refuses", "total_steps"],
    ),
    "no tokens to write": (["--model.max_new_tokens", "0"], ["max_new_tokens is 0"]),
    "missing file": (["--data.train", "nowhere.jsonl"], ["nowhere.jsonl"]),
    "wrong field": (["--data.text", "body"], ["body", "text"]),
    "field of another type": (["--data.text", "n"], ["n"]),
    "empty data set": (["--data.train", "empty.jsonl"], ["empty"]),
    "broken JSON": (["--data.train", "broken.jsonl"], ["broken.jsonl", "line 2"]),
    "no data": (["--data.train", "null"], ["train"]),
    "rows too long": (["--data.max_length", "5000"], ["5000", "1024"]),
    "no rows in a batch": (["--data.batch_size", "0"], ["batch_size"]),
    "a word for a number": (["--data.batch_size", "many"], ["batch_size", "many"]),
    "unknown target modules": (["--model.adapter", "{target_modules: [nothing]}"], ["nothing"]),
    "rank above min(m, n)": (["--model.adapter", "{r: 300}"], ["300", "256", "rank_pattern"]),
    "rank too high for the start": (["--model.adapter", "{r: 100}", *LOI], ["2r", "100"]),
    "rank zero": (["--model.adapter", "{r: 0}"], ["`r`", "0"]),
    "misspelt adapter field": (["--model.adapter", "{lora_aplha: 4}"], ["lora_aplha", "lora_alpha"]),
    "a start in the adapter's fields": (["--model.adapter", "{init_lora_weights: pissa}"], ["AdapterInit", "PiSSA"]),
    "LoRA+ on the manifold": (["--model.lr_ratio", "16"], ["Riemannion", "lr_ratio"]),
    "unknown adapter type": (["--model.adapter", "{peft_type: LORRA}"], ["LORRA", "LORA"]),
    "no such base": (["--model.base", "nobody/nothing"], ["nobody/nothing"]),
    "folder without a model": (["--model.base", "."], ["'.'"]),
    "no such embedded model": (["--model.base", "embedded:huge"], ["embedded:tiny-lm"]),
    "no saved adapter": (["--model.adapter", "null", "--model.adapter_path", "."], ["adapter_config.json"]),
    "misspelt option": (["--trainer.max_stepz", "3"], ["max_stepz"]),
    "misspelt argument": (["--model.bsae", "x"], ["bsae"]),
    "misspelt class": (["--model.optimizer", "Riemanion"], ["Riemanion"]),
    "misspelt callback": (["--trainer.callbacks", "[{class_path: Retract}]"], ["Retract"]),
    "negative rate": (["--model.optimizer", "Riemannion", "--model.optimizer.lr", "-1"], ["lr", "-1"]),
    "momentum of one": (["--model.optimizer", "Riemannion", "--model.optimizer.momentum", "1"], ["momentum"]),
    "a loss that is not finite": (["--model.optimizer", "Riemannion", "--model.optimizer.lr", "1e30"], ["lower"]),
    "no GPU": (["--trainer.accelerator", "gpu"], ["gpu"]),
    "no such precision": (["--trainer.precision", "fp8"], ["precision", "bf16-mixed"]),
    "half-precision factors": (["--trainer.precision", "bf16-true"], ["bf16-mixed"]),
    "clipping by value": (
        ["--trainer.gradient_clip_val", "1", "--trainer.gradient_clip_algorithm", "value"],
        ["norm"],
    ),
    "frozen adapter": (["--model.adapter", "{r: 4, inference_mode: true}"], ["unfrozen"]),
    "a schedule without a length": (
        ["--trainer.max_steps", "-1", "--data.streaming", "true", "--model.lr_scheduler", "LinearWithWarmup"],
        ["max_steps"],
    ),
    "no start of size zero": (
        ["--trainer.callbacks", "[{class_path: LocallyOptimalInit, init_args: {alpha: 0}}]"],
        ["alpha"],
    ),
    "missing configuration": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    "configuration without a name": (["--config"], ["expected one argument"]),
    "configuration with a typo": (["--config", "typo.yaml"], ["bsae"]),
    "missing checkpoint": (["--ckpt_path", "nowhere.ckpt"], ["nowhere.ckpt"]),
    "broken checkpoint": (["--ckpt_path", "broken.ckpt"], ["broken.ckpt"]),
    "a sharded checkpoint": (["--ckpt_path", "."], ["is a folder", "one file"]),
    "an option that the strategy does not have": (
        ["--trainer.strategy", "FSDP2Strategy", "--trainer.strategy.save_distributed_checkpoint", "true"],
        ["trainer.strategy: Option 'save_distributed_checkpoint' is not accepted"],
    ),
    "a file in the folder's place": (["--trainer.default_root_dir", "data.jsonl"], ["data.jsonl"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_status_two(case, folder, capsys):
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("typo.yaml").write_text("model:\n  class_path: CausalLM\n  init_args:\n    bsae: x\n")
    Path("broken.ckpt").write_bytes(b"PK\x03\x04 and no more")
    arguments, words = BAD_INPUT[case]
    fails(FIT + arguments, capsys, *words)
    assert not Path("run/adapter").exists()
    assert not list(Path().rglob("*.partial"))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["fti"], "fti"),
        ([], "COMMAND"),
        (["export", "--output", "x"], "--ckpt_path"),
        (["export", "--ckpt_path", "nowhere.ckpt", "--output", "x"], "nowhere.ckpt"),
        (["merge", "--ckpt_path", "data.jsonl", "--output", "x"], "data.jsonl"),
    ],
)
def test_bad_commands(arguments, word, folder, capsys):
    fails(arguments, capsys, word)


def test_a_bug_keeps_its_traceback(folder, monkeypatch):
    def broken(*args):
        raise AttributeError("a bug")

    monkeypatch.setattr("lightning_rlora.trainer_cli.RloraCLI", broken)
    with pytest.raises(AttributeError, match="a bug"):
        main(["fit"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run with a locally optimal start, and of one command after another on it."""
    home = tmp_path_factory.mktemp("finished")
    old = Path.cwd()
    os.chdir(home)
    records = [{"text": f"The {n}th of the many sentences that tell a number."} for n in range(24)]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    steps = ["--trainer.max_steps", "4", "--trainer.log_every_n_steps", "2"]
    main([*FIT, *LOI, *steps, "--trainer.callbacks+=Retraction"])
    os.chdir(old)
    return home


def test_fit_leaves_everything_in_its_folder(finished):
    run_folder = finished / "run"
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {"config.yaml", "metrics.csv", "checkpoints", "adapter", "loss.png", "spectrum.png"}
    header, first, *_ = (run_folder / "metrics.csv").read_text().splitlines()
    assert header.split(",")[:4] == ["step", "train/loss", "val/loss", "val/perplexity"]
    assert first.startswith("0,,")
    checkpoint, adapter = run_folder / "checkpoints" / "last.ckpt", run_folder / "adapter"
    # half of the exported adapter is the trained one's size: the other half is the offset (measured 3.35 times it)
    assert checkpoint.stat().st_size <= 4 * 0.5 * (adapter / "adapter_model.safetensors").stat().st_size


def test_the_saved_configuration_runs_again(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    arguments = ["validate", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    status, out, err = run(arguments, capsys)
    assert status == 0, err
    assert "val/perplexity" in out


def test_predict_writes_completions(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    Path("prompts.jsonl").write_text('{"text": "The 3th of"}\n{"text": "Once upon a time there was"}\n')
    arguments = [
        "predict",
        *("--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"),
        *("--data.predict", "prompts.jsonl", "--model.max_new_tokens", "5"),
    ]
    status, _, err = run(arguments, capsys)
    assert status == 0, err
    records = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["The 3th of", "Once upon a time there was"]
    assert all(record["completion"] for record in records)


def test_export_and_merge_give_what_was_trained(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    for command, output in (("export", "exported"), ("merge", "merged")):
        status, _, err = run([command, "--ckpt_path", "run", "--output", output], capsys)
        assert status == 0, err
    program = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, ids = sys.argv[1], torch.arange(40).view(2, 20) * 97 % 4096
load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
with torch.no_grad():
    adapters = [PeftModel.from_pretrained(load(base), f).eval()(ids).logits for f in ("run/adapter", "exported")]
    results = dict(zip(("adapter", "exported"), adapters))
    results |= {"merged": load("merged")(ids).logits, "base": load(base)(ids).logits}
torch.save(results, "logits.pt")
assert not any(name.startswith("lightning_rlora") for name in sys.modules)
"""
    from lightning_rlora.assets import resolve
    from lightning_rlora.modules.checkpoint import load_module

    subprocess.run([sys.executable, "-c", program, resolve("embedded:tiny-lm")], check=True, capture_output=True)
    logits = torch.load("logits.pt", weights_only=True)
    with torch.no_grad():
        ids = torch.arange(40).view(2, 20) * 97 % 4096
        trained = load_module("run/checkpoints/last.ckpt")({"input_ids": ids}).logits
    assert (trained - logits["base"]).abs().max() > 0.1
    for name in ("adapter", "exported", "merged"):
        assert (trained - logits[name]).abs().max() < 1e-4, name  # logits of size 10; measured 1e-5

    status, out, _ = run(["export", "--ckpt_path", "run", "--output", "cut", "--truncated"], capsys)
    assert status == 0
    assert "truncation error" in out
    assert json.loads(Path("cut/adapter_config.json").read_text())["r"] == 4
    fails(["merge", "--ckpt_path", "run", "--output", "merged"], capsys, "not empty")


def test_checkpoints_of_another_model_are_refused(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    resume = ["--ckpt_path", "run/checkpoints/last.ckpt", "--trainer.default_root_dir", "other"]
    fails([*FIT, *resume, "--model.adapter", "{r: 6}"], capsys, "rank")
    fails([*FIT, *resume, "--model.adapter", "{r: 4, target_modules: [q_proj]}"], capsys, "target modules")
    fails([*FIT, *resume, "--model.optimizer", "torch.optim.SGD"], capsys, "optimizer")
    half = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    for key in half["state_dict"]:
        if key.endswith("fingerprint"):
            half["state_dict"][key] += 1.0
    torch.save(half, "foreign.ckpt")
    fails([*FIT, "--ckpt_path", "foreign.ckpt", "--trainer.default_root_dir", "other"], capsys, "another base model")
    whole = Path("run/checkpoints/last.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("tiny.ckpt").write_bytes(whole[:5000])
    fails([*FIT, "--ckpt_path", "tiny.ckpt", "--trainer.default_root_dir", "other"], capsys, "tiny.ckpt", "truncated")
    fails([*FIT, "--ckpt_path", "half.ckpt", "--trainer.default_root_dir", "other"], capsys, "half.ckpt", "truncated")


def test_ckpt_path_last_without_a_checkpoint_starts_afresh_and_says_so(folder, capsys):
    with pytest.warns(UserWarning, match="no last checkpoint available"):
        status, _, err = run([*FIT, "--ckpt_path", "last"], capsys)
    assert status == 0, err
    assert Path("run/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_measuring_the_last_checkpoint_needs_one(command, folder, capsys):
    arguments = [command, *FIT[1:], "--data.test", "data.jsonl", "--data.predict", "data.jsonl", "--ckpt_path", "last"]
    fails(arguments, capsys, "last.ckpt")


def test_an_adapter_of_another_scaling_is_refused(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    arguments = ["validate", "--config", "run/config.yaml", "--ckpt_path", "run/checkpoints/last.ckpt"]
    fails([*arguments, "--model.adapter.lora_alpha", "8"], capsys, "lora_alpha")


def test_with_a_logger_checkpoints_are_still_in_the_runs_folder(folder, capsys):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert run([*FIT, *logger], capsys)[0] == 0
    assert Path("run/checkpoints/last.ckpt").is_file()
    assert run([*FIT, *logger, "--trainer.max_steps", "3", "--ckpt_path", "last"], capsys)[0] == 0
    assert not Path("run/previous").exists()
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_an_adapter_that_is_no_lora_pair_is_trained_by_adamw_and_exported(folder, capsys):
    vera = "{peft_type: VERA, r: 8, target_modules: [q_proj]}"
    with pytest.warns(UserWarning, match="left to AdamW"):
        status, _, err = run([*FIT, "--model.adapter", vera], capsys)
    assert status == 0, err
    assert json.loads(Path("run/adapter/adapter_config.json").read_text())["peft_type"] == "VERA"


def test_a_second_run_in_a_folder_loses_nothing(folder, capsys):
    assert run(FIT, capsys)[0] == 0
    before = Path("run/metrics.csv").read_text()
    assert run([*FIT, "--seed_everything", "1"], capsys)[0] == 0
    assert Path("run/previous/1/metrics.csv").read_text() == before
    assert Path("run/previous/1/checkpoints/last.ckpt").is_file()


def test_data_that_cannot_be_read_leave_an_earlier_run_alone(folder, capsys):
    assert run(FIT, capsys)[0] == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    fails([*FIT, "--data.text", "body"], capsys, "body")
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_a_full_disk_leaves_no_half_configuration(folder, monkeypatch, capsys):
    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(FIT, capsys, "No space left on device", "run/")
    assert not [path for path in Path("run").rglob("*") if path.is_file()]


def test_a_full_disk_leaves_the_last_checkpoint_whole(folder, monkeypatch, capsys):
    saved = []
    save = torch.save

    def save_until_full(state, file, *args, **kwargs):
        saved.append(file)
        if len(saved) > 2:
            file.write(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(state, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save_until_full)
    arguments = [*FIT, "--trainer.max_steps", "6", "--checkpoint.every_n_train_steps", "1"]
    fails(arguments, capsys, "No space left on device", "run/checkpoints")
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    assert not list(Path("run/checkpoints").glob(".*"))


def test_plots_without_room_cost_no_checkpoint_and_no_adapter(folder, monkeypatch):
    write = Path.write_bytes

    def full_for_plots(self, content):
        if ".png" in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", full_for_plots)
    with pytest.warns(UserWarning, match=r"the plot run/.*\.png could not be written: No space left") as warned:
        main([*FIT, "--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1"])
    texts = [str(warning.message) for warning in warned]
    assert all(any(name in text for text in texts) for name in ("loss.png", "spectrum.png"))
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3
    assert Path("run/adapter/adapter_model.safetensors").is_file()


def test_a_trial_run_leaves_nothing(folder):
    main([*FIT, "--trainer.fast_dev_run", "1"])
    assert not Path("run").exists()


def test_a_read_only_folder_is_named(folder, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    fails(FIT, capsys, "Permission denied", "run")


def test_help_is_quick():
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "lightning_rlora.cli", "--help"], capture_output=True, text=True)
    assert time.perf_counter() - start < 3  # measured 0.2 s
    assert result.returncode == 0
    assert "quickstart" in result.stdout
    assert (
        "torch"
        not in subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "lightning_rlora.cli", "--help"], capture_output=True, text=True
        ).stderr
    )
