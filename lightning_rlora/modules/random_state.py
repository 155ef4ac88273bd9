"""The random state of a process, which checkpoints hold."""

import random
from typing import Any

import torch


def save_random_state(device: torch.device) -> dict[str, Any]:
    """The states that dropout and Python code of this process draw from; data order has generators of its own."""
    version, state, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": (version, list(state), gauss),
    }


def restore_random_state(states: dict[str, Any]) -> None:
    """Go on from what `save_random_state` returned."""
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))
