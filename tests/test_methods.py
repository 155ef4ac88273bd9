"""Every shipped method trains the embedded model, resumes exactly, and exports an adapter that PEFT alone loads."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora.adapters import adapter_config
from lightning_rlora.callbacks import run_record, spectrum_monitor
from lightning_rlora.cli import main
from lightning_rlora.modules.base_model import load_base
from lightning_rlora.modules.checkpoint import load_module

CONFIGS = Path(__file__).parents[1] / "configs"
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
OPTIONS = [
    *("--data.train", "data.jsonl", "--data.batch_size", "2", "--data.max_length", "32"),
    *("--trainer.max_steps", "30", "--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"),
    *("--trainer.val_check_interval", "null", "--trainer.check_val_every_n_epoch", "1"),
    *("--trainer.log_every_n_steps", "1", "--spectrum.every_n_steps", "1000"),
    *("--checkpoint.every_n_train_steps", "15", "--checkpoint.save_top_k", "-1"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
]
QUICKER = {name: ["--trainer.callbacks.start.init_args.batches=1"] for name in ("eva", "corda")}
# torch's Muon multiplies in bfloat16: minutes for all layers on a processor that has no such product
QUICKER["full_muon"] = ["--model.adapter.modules_to_save", "[v_proj]"]
SENTENCES = [
    "The quick brown fox jumps over the lazy dog by the river.",
    "A tuple is an immutable sequence of values in a fixed order.",
    "She opened the letter slowly and read it to the very end.",
    "Generators yield their values one at a time, and only on demand.",
    "The captain looked at the sea and saw no sail on it.",
    "Every function returns a value, and None if nothing is said.",
    "It was raining in London when the carriage came to a halt.",
    "A dictionary maps keys to values and remembers their order.",
]


def losses(folder):
    rows = (folder / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/loss")
    return [float(row.split(",")[column]) for row in rows[1:]]


def classes(config):
    """The callbacks and the optimizer of a configuration."""
    found = [*config["trainer"]["callbacks"], config["model"]["init_args"]["optimizer"]]
    return [entry["class_path"].rpartition(".")[2] for entry in found]


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_there_are_the_methods_of_the_family():
    family = (
        "lora lora_plus rslora dora vera qlora loftq pissa olora stiefel_a stiefel_b stiefel_both lora_ga eva corda "
    )
    family += "qlora_dora_lora_plus riemannion riemannion_loi whitened_riemannion riemannian_sgd_loi "
    family += "lora_fa rprec_adamw lora_rite factor_muon lora_muon lora_tsd polora"
    assert {path.stem for path in METHODS} >= set(family.split())


def test_a_later_configuration_adds_to_the_adapters_fields(tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("model: {init_args: {adapter: {use_dora: true, r: 5, lora_alpha: null}}}")
    files = ["--config", str(CONFIGS / "quickstart.yaml"), "--config", str(tmp_path / "more.yaml")]
    with pytest.raises(SystemExit):
        main(["fit", *files, "--model.adapter.lora_dropout", "0.1", "--print_config"])
    adapter = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["adapter"]
    # null stands for PEFT's own default
    assert adapter == {
        "r": 5,
        "lora_alpha": None,
        "target_modules": "all-linear",
        "use_dora": True,
        "lora_dropout": 0.1,
    }


def test_another_optimizer_takes_no_options_of_the_one_before(tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("model: {init_args: {optimizer: {class_path: LoRAMuon, init_args: {lr: 0.2}}}}")
    (tmp_path / "last.yaml").write_text("model: {init_args: {optimizer: {init_args: {weight_decay: 0.1}}}}")
    (tmp_path / "bare.yaml").write_text("model: {init_args: {optimizer: LoRAMuon}}")
    for middle, lr in (("more.yaml", 0.2), ("bare.yaml", 0.01)):
        files = ["quickstart.yaml", tmp_path / middle, tmp_path / "last.yaml"]
        with pytest.raises(SystemExit):
            main(["fit", *(part for file in files for part in ("--config", str(CONFIGS / file))), "--print_config"])
        options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]["init_args"]
        # the quickstart has a rate of 0.1 and a momentum of 0.6
        assert (options["lr"], options["weight_decay"], options["momentum"]) == (lr, 0.1, 0.9)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_its_adapter_has_a_place_on_every_configuration(path):
    for config in CONFIGS.glob("*.yaml"):
        below, above = (yaml.safe_load(file.read_text())["model"]["init_args"] for file in (config, path))
        fields = below["adapter"] | above.get("adapter", {})
        adapter_config({name: value for name, value in fields.items() if value is not None})


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_it_trains_resumes_exactly_and_exports(path, tmp_path, monkeypatch):
    if re.search("quantization: .bit", path.read_text()):
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(run_record, "draw_losses", lambda *args: None)  # plots take a third of a run this short
    monkeypatch.setattr(spectrum_monitor, "draw_spectra", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    fit = [
        "fit",
        "--config",
        str(CONFIGS / "quickstart.yaml"),
        "--config",
        str(path),
        *OPTIONS,
        *QUICKER.get(path.stem, []),
    ]

    main([*fit, "--trainer.default_root_dir", "whole"])
    curve = losses(Path("whole"))
    print(f"\nloss {sum(curve[:4]) / 4:.3f} -> {sum(curve[-4:]) / 4:.3f}")
    assert len(curve) == 30
    taken, written = yaml.safe_load(Path("whole/config.yaml").read_text()), yaml.safe_load(path.read_text())
    assert classes(taken) == classes(written)  # and none of the quickstart's
    assert sum(curve[-4:]) < 0.95 * sum(curve[:4])

    main([*fit, "--trainer.default_root_dir", "resumed", "--ckpt_path", "whole/checkpoints/step=15.ckpt"])
    ends = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "resumed")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 30
    assert same(ends[0]["state_dict"], ends[1]["state_dict"])
    assert same(ends[0]["optimizer_states"][0]["state"], ends[1]["optimizer_states"][0]["state"])
    assert losses(Path("resumed"))[-15:] == curve[-15:]

    module = load_module("whole/checkpoints/last.ckpt")
    quantization = written["model"]["init_args"].get("quantization")
    base = load_base("embedded:tiny-lm", dtype="float32", quantization=quantization, trust_remote_code=False)
    ids = torch.arange(2, 42).view(2, 20)
    with torch.no_grad():
        pristine = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, "whole/adapter").eval()(input_ids=ids).logits
        trained = module.model(input_ids=ids).logits
    error = float((loaded - trained).abs().max() / trained.abs().max())
    print(f"logits differ by {error:.1e} of the largest")
    assert float((pristine - trained).abs().max() / trained.abs().max()) > 0.01  # the adapter does something
    assert error < 1e-4  # measured 3e-6 with an offset, 0 without
