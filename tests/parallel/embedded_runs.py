"""Trainers and batches for the package's embedded language model on several processes."""

import torch
from fits import STRATEGIES
from lightning.pytorch import Trainer

PROMPT = {
    "input_ids": torch.arange(2, 8)[None],
    "attention_mask": torch.ones(1, 6, dtype=torch.int64),
    "prompt": ["x"],
}


def question(number):
    """A batch of one question, as ReasoningData collates it."""
    return PROMPT | {"task": ["gsm8k"], "number": [number], "choices": [[]], "gold": ["1"]}


def rows(count, length=12):
    ids = torch.randint(2, 4096, (count, length), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in ids]


def trainer(strategy, count, folder, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu", devices=count, strategy=STRATEGIES[strategy](), default_root_dir=folder, **quiet | options
    )
