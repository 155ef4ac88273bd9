"""The quickstart beside plain LoRA + AdamW at the same number of steps, over learning rates: a table for the README.

    python examples/quickstart/sweep.py --output runs/quickstart_sweep

Every run is one `rlora fit` of configs/quickstart.yaml with options overridden; a finished run is not repeated.
"""

import argparse
import csv
import platform
import subprocess
import sys
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
METHODS = {
    "LoRA + AdamW": (
        [0.002, 0.004, 0.008, 0.011, 0.016, 0.022, 0.032],
        ["--trainer.callbacks", "null", "--model.optimizer", "torch.optim.AdamW"],
    ),
    "Riemannion": (
        [0.06, 0.1, 0.15],
        ["--trainer.callbacks", "null", "--model.optimizer", "Riemannion", "--model.optimizer.momentum", "0.6"],
    ),
    "WhitenedRiemannion": ([0.15, 0.25, 0.35, 0.5, 0.7], ["--trainer.callbacks", "null"]),
    "WhitenedRiemannion + LOI (the quickstart)": ([0.15, 0.25, 0.35, 0.5, 0.7], []),
}


def final_perplexity(folder: Path) -> float:
    with (folder / "metrics.csv").open() as file:
        values = [row["val/perplexity"] for row in csv.DictReader(file) if row["val/perplexity"]]
    return float(values[-1])


def run(folder: Path, options: list[str], rate: float) -> str:
    """Validation perplexity at the end of a run, or why there is none."""
    done = folder / "adapter" / "adapter_config.json"
    if not done.exists():
        command = [sys.executable, "-m", "lightning_rlora.cli", "fit", "--config", str(CONFIG), *options]
        command += ["--model.optimizer.lr", str(rate), "--trainer.default_root_dir", str(folder)]
        result = subprocess.run([*command, "--trainer.enable_progress_bar", "false"], capture_output=True, text=True)
        if result.returncode:
            return result.stderr.strip().splitlines()[-1]
    return f"{final_perplexity(folder):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_sweep"))
    output = parser.parse_args().output
    print(f"Python {platform.python_version()}: perplexity on held-out topics after 60 steps\n")
    print("| method | learning rate | perplexity |\n| --- | --- | --- |")
    for method, (rates, options) in METHODS.items():
        for rate in rates:
            print(f"| {method} | {rate} | {run(output / f'{method} {rate}', options, rate)} |", flush=True)


if __name__ == "__main__":
    main()
