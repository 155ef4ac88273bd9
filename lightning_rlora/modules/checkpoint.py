"""A module back from a checkpoint file, and an ordinary model as a folder."""

import inspect
import shutil
import tempfile
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_rlora import modules
from lightning_rlora.adapters import read_checkpoint
from lightning_rlora.errors import UserError


def load_module(path: str | Path) -> Any:
    """The module that a checkpoint was made from, with its trained adapter and its base, offset included, on the CPU.

    Raises:
        UserError: If the checkpoint cannot be read, says not how its module was made, or belongs to another base.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters", {})
    if not settings:
        raise UserError(f"{path} does not say how its model was made: it is no checkpoint of this program's modules")
    module_class: Any = getattr(modules, checkpoint.get("module", "CausalLM"))
    if "_class_path" in settings:
        home, _, name = settings["_class_path"].rpartition(".")
        module_class = getattr(import_module(home), name)
    if inspect.isabstract(module_class):
        raise UserError(f"{path} belongs to a module class of your own: load it by that class's load_from_checkpoint")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Found keys that are in the model state dict")  # the base, as it should be
        return module_class.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()


def save_pretrained(folder: Path, *parts: Any) -> None:
    """Save a model and its tokenizer, or a pipeline, into a new or empty folder, as a whole or not at all.

    Args:
        folder: Where to.
        parts: What has a `save_pretrained` of its own, all into this folder.

    Raises:
        UserError: If the folder holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part in parts:
            part.save_pretrained(partial)
        partial.chmod(0o755)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
