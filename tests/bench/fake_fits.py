"""Training functions that train nothing: what they do is told by the optimizer's class and the rate."""

import os
from pathlib import Path

import yaml

from lightning_rlora.errors import Diverged, UserError


def fake_fit(config: Path) -> None:
    """Leave metrics as a run does; die, fail or diverge as the configuration says; write every call down."""
    content = yaml.safe_load(config.read_text())
    rate = content["model"]["init_args"]["optimizer"]["init_args"]["lr"]
    kind = content["model"]["init_args"]["optimizer"]["class_path"]
    folder, steps = Path(content["trainer"]["default_root_dir"]), content["trainer"]["max_steps"]
    calls = Path(content["data"]["init_args"]["train"]).parent / "calls"
    with calls.open("a") as file:
        file.write(f"{kind} {rate} {content['seed_everything']} {os.getpid()}\n")
    print("trained", flush=True)
    if kind == "Dies":
        os._exit(3)
    if kind == "Bug":
        raise RuntimeError("two\nlines")
    if kind == "Wrong":
        raise UserError("no such file")
    if kind == "Diverges" and rate > 0.5:
        raise Diverged("the training loss is nan")
    loss = "nan" if kind == "NaN" else 2 + rate
    rows = ["step,train/loss,val/loss", "0,,5.0", f"{steps // 2},4.0,4.0", f"{steps},3.0,{loss}"]
    (folder / "metrics.csv").write_text("\n".join(rows[: -1 if kind == "Unvalidated" else None]) + "\n")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"1234")
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
