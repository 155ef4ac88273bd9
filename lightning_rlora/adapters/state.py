"""What a checkpoint must hold of an adapted model: everything but the frozen base."""

import errno
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlora.adapters.offset import NAME
from lightning_rlora.adapters.pairs import plain
from lightning_rlora.errors import UserError


def adapter_keys(module: nn.Module) -> set[str]:
    """The keys of `module.state_dict()` that are trained or belong with what is.

    Those are the trainable parameters, the offsets of the base, the buffers of modules that train (statistics of a norm
    in a trained head), and the frozen LoRA factors of an adapter of which something trains.

    Args:
        module: An adapted model, or a LightningModule that contains one.
    """
    keys = {plain(name) for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    trained_adapters = {_adapter_of(key) for key in keys} - {None}
    for name, part in module.named_modules(remove_duplicate=False):
        if any(parameter.requires_grad for parameter in part.parameters(recurse=False)):
            keys |= {plain(f"{name}.{key}").lstrip(".") for key, _ in part.named_buffers(recurse=False)}
    state = module.state_dict()
    together = {key for key in state if f".{NAME}." in f".{key}" or _adapter_of(key) in trained_adapters}
    return (keys | together) & state.keys()


def _adapter_of(key: str) -> str | None:
    """The adapter's name in the key of a LoRA tensor, as in `q_proj.lora_A.default.weight`."""
    found = re.search(r"\.lora_[^.]+\.([^.]+)", key)
    return found.group(1) if found else None


def keep_adapter(module: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a state dict that an adapter-only checkpoint holds."""
    keys = adapter_keys(module)
    return {key: value for key, value in state_dict.items() if key in keys}


def check_adapter(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict whose adapter does not fit the module's, before anything is loaded.

    Raises:
        UserError: If a trained tensor of the module is missing in the state dict, or has another shape there (an
            adapter of another rank, or for another base).
    """
    parameters = {plain(n): p for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    for name, parameter in parameters.items():
        saved = state_dict.get(name)
        if not isinstance(saved, Tensor):
            raise UserError(
                f"the checkpoint has no '{name}': it was made with other target modules or for another base model"
            )
        if saved.shape != parameter.shape:
            raise UserError(
                f"the checkpoint's '{name}' has shape {tuple(saved.shape)} and the model's {tuple(parameter.shape)}: "
                "it was made with another rank, or for another base model"
            )
    surplus = [key for key in state_dict if ".lora_" in key and key not in parameters]
    known = module.state_dict().keys() if surplus else ()
    for key in surplus:
        if key not in known:
            raise UserError(
                f"the checkpoint's '{key}' has no place in the model: it was made with other target modules"
            )
    for key, value in state_dict.items():
        if key.endswith(f"{NAME}.left") and value.shape[1] > 0 and key not in module.state_dict():
            raise UserError(
                "the checkpoint's adapter comes with an offset of the base, which the model does not track: call "
                "track_offsets(find_pairs(model)) before loading"
            )


def read_checkpoint(path: str | os.PathLike, map_location: Any = "cpu") -> dict[str, Any]:
    """The contents of a checkpoint file: tensors and plain data, no code.

    Raises:
        UserError: If the file does not exist, is a folder or truncated, or holds more than tensors and plain data.
    """
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder, as sharded checkpoints are: name a checkpoint of this program, one file")
    if not Path(path).is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        contents = torch.load(path, map_location=map_location, weights_only=True)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what seeking in a truncated file gives
            raise
        raise UserError(f"{path} is truncated or no checkpoint of this program: use another one") from error
    except Exception as error:  # bytes that are no checkpoint make torch raise almost anything
        raise UserError(f"{path} is truncated or no checkpoint of this program: use another one") from error
    if not isinstance(contents, dict):
        raise UserError(f"{path} holds a {type(contents).__name__} and is no checkpoint of this program")
    return contents
