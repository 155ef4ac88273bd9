"""Every shipped configuration parses as it is, and runs with tiny stand-ins for what is not at hand."""

import json
from pathlib import Path

import pytest
import yaml
from task_records import RECORDS

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.cli import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def test_there_are_configurations():
    assert {path.stem for path in CONFIGS} >= {
        "quickstart",
        "riemannion_loi",
        "riemannlora_sgd",
        "riemannlora_adam",
        "lora_adamw",
        "commonsense_riemannion",
        "commonsense_lora_adamw",
        "commonsense_dora",
        "gsm8k_riemannion",
        "metamath_riemannion",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_parses_and_can_be_overridden(path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", str(path), "--model.adapter.r", "3", "--trainer.max_steps", "7", "--print_config"])
    assert end.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(path.read_text())
    assert printed["model"]["init_args"]["adapter"] == written["model"]["init_args"]["adapter"] | {"r": 3}
    assert printed["trainer"]["max_steps"] == 7
    assert printed["trainer"]["default_root_dir"] == written["trainer"]["default_root_dir"] == f"runs/{path.stem}"
    optimizer = written["model"]["init_args"]["optimizer"]
    assert printed["model"]["init_args"]["optimizer"]["class_path"].endswith(optimizer["class_path"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_with_tiny_stand_ins(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    config = path.read_text()
    if "embedded:" not in config:
        options += ["--model.base", "embedded:tiny-lm", *stand_ins(yaml.safe_load(config)["data"])]
    main(["fit", "--config", str(path), *options])
    assert not Path("runs").exists() or not list(Path("runs").rglob("adapter"))


def stand_ins(data):
    """Options that put small files in the place of a configuration's data."""
    sets = {name: f"{name}.jsonl" for name in RECORDS}
    for name, file in sets.items():
        Path(file).write_text((json.dumps(RECORDS[name]) + "\n") * 40)
    if data["class_path"] == "TextData":
        return ["--data.train", sets["gsm8k"], "--data.test", "null", "--data.max_length", "48"]
    tasks = {stage: {task: sets[task] for task in data["init_args"][stage]} for stage in ("train", "test")}
    options = ["--data.max_length", "640", "--data.batch_size", "2", "--data.validation_fraction", "0.1"]
    return [*options, *(part for stage in tasks for part in (f"--data.{stage}", json.dumps(tasks[stage])))]
