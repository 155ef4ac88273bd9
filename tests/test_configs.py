"""Every shipped configuration parses as it is, and runs with tiny stand-ins for what is not at hand."""

import json
from pathlib import Path

import pytest
import yaml
from task_records import RECORDS
from tiny_pipelines import saved

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.cli import main
from lightning_rlora.data.classification import GLUE_TEXTS
from lightning_rlora.modules.glue import GLUE

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
        *(f"glue_{task}_{model}" for task in ("sst2", "mnli", "qqp", "qnli") for model in ("roberta", "gpt2")),
        *(f"dreambooth_{way}" for way in ("quickstart", "sd2_riemannion", "sd2_lora_adamw", "sdxl_riemannion")),
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


def classification_stand_ins(task):
    """Options for a small file with the task's columns and classes, and for a base whose layers have other names."""
    records = [
        dict.fromkeys(GLUE_TEXTS[task], f"The {number}th of many sentences.") | {"label": label}
        for number in range(8)
        for label in GLUE[task].class_names
    ]
    Path("data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = ["--model.base", "embedded:tiny-lm", "--model.adapter.target_modules", "[q_proj, v_proj]"]
    return [*base, "--data.train", "data.jsonl", "--data.batch_size", "8"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_runs_with_tiny_stand_ins(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.fast_dev_run", "2", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    config = yaml.safe_load(path.read_text())
    if config["model"]["class_path"] == "TextToImage" and "embedded:" not in config["model"]["init_args"]["pipeline"]:
        options += ["--model.pipeline", saved(tmp_path / "pipeline", "sdxl" if "sdxl" in path.stem else "sd15")]
        options += ["--model.truncate_prompts", "true", "--data.images", "embedded:robot", "--data.size", "16"]
    elif config["model"]["class_path"] == "SequenceClassification":
        options += classification_stand_ins(config["data"]["init_args"]["task"])
    elif config["model"]["class_path"] == "CausalLM" and "embedded:" not in config["model"]["init_args"]["base"]:
        options += ["--model.base", "embedded:tiny-lm", *stand_ins(config["data"])]
    for callback in config["trainer"].get("callbacks") or []:
        if callback["class_path"] == "LocallyOptimalInit":
            callback["init_args"] |= {"power_steps": 1, "batches": 1, "draws": 1}  # no more of the same
    path = tmp_path / path.name
    path.write_text(yaml.safe_dump(config))
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
