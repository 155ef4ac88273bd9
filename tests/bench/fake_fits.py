"""Training functions that train nothing: what they do is told by the optimizer's class and the rate."""

import os
from pathlib import Path

import yaml

from lightning_rlora.errors import Diverged, UserError


def overflow(kind: str, rate: float) -> None:
    """A real step of one of our methods with a gradient that is too large for its numbers."""
    import torch
    from peft import LoraConfig, inject_adapter_in_model

    from lightning_rlora import optim

    torch.manual_seed(0)
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(4, 4)))
    optimizer = getattr(optim, kind).for_model(model, lr=rate)
    (model(torch.full((2, 4), 1e30)) * 1e30).sum().backward()
    optimizer.step()


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
    if kind in ("Riemannion", "FactorMuon"):
        overflow(kind, rate)
    loss = "nan" if kind == "NaN" else 2 + rate
    rows = [
        "step,train/loss,val/loss,val/accuracy",
        "0,,5.0,0.5",
        f"{steps // 2},4.0,4.0,nan",
        f"{steps},3.0,{loss},nan",
    ]
    (folder / "metrics.csv").write_text("\n".join(rows[: -1 if kind == "Unvalidated" else None]) + "\n")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"1234")
    (folder / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
