"""The cases of test_nccl.py in one process, started by torchrun: STRATEGY PROCESSES FOLDER."""

import os
import sys
from pathlib import Path

import torch
from fits import fit

CASES = {
    "Riemannion with LOI, accumulated and clipped": {"loi": True, "accumulate": 2, "clip": 0.05},
    "Riemannion in float32": {"dtype": torch.float32},
    "AdamW, clipped": {"method": "AdamW", "clip": 0.05},
    "bfloat16 base": {"dtype": torch.bfloat16, "precision": "bf16-mixed", "loi": True, "steps": 10},
    "16-mixed": {"dtype": torch.float32, "precision": "16-mixed", "steps": 10},
}

if __name__ == "__main__":
    strategy, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    results = {name: fit(strategy, count, folder=folder, accelerator="gpu", **case) for name, case in CASES.items()}
    torch.save(results, folder / f"{strategy}.{os.environ.get('RANK', 0)}")
