"""Taking an adapter out: PEFT's format for the pristine base, image tools' for a UNet, or merged into its base."""

import glob
import re
import shutil
import tempfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_rlora.adapters.diffusers_format import (
    DIFFUSERS_WEIGHTS,
    KOHYA_WEIGHTS,
    is_diffusers_unet,
    write_diffusers_files,
)
from lightning_rlora.adapters.offset import offset_factors, untrack_offsets
from lightning_rlora.adapters.pairs import LoraPair, find_pairs, matrix, scan, with_shared_base
from lightning_rlora.errors import UserError

_ADAPTER_FILES = {
    *("adapter_config.json", SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, "README.md"),
    *(DIFFUSERS_WEIGHTS, KOHYA_WEIGHTS),
}
"""What PEFT and `write_diffusers_files` write into an adapter's folder: all that an export may replace."""

_PEFT_PREFIX = "base_model.model."


@torch.no_grad()
def update_factors(pair: LoraPair) -> tuple[Tensor, Tensor]:
    """Factors (m, k), (k, n) of c B A - X0 in float64, the exact change of the pristine base; k is r or 2r."""
    left, right = pair.scaling * matrix(pair.b).double(), matrix(pair.a).double()
    offset = offset_factors(pair)
    if offset is None:
        return left, right
    return torch.cat([left, -offset[0].double()], 1), torch.cat([right, offset[1].double()], 0)


def truncate(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-`rank` approximation of left right as balanced factors, and its relative Frobenius error."""
    ql, rl = torch.linalg.qr(left)
    qr, rr = torch.linalg.qr(right.mT)
    u, s, vt = torch.linalg.svd(rl @ rr.mT)
    root = s[:rank].sqrt()
    error = float(s[rank:].norm() / s.norm()) if bool(s.any()) else 0.0
    return ql @ (u[:, :rank] * root), (qr @ vt[:rank].mT * root).mT, error


def export_adapter(model: nn.Module, folder: str | Path, *, truncated: bool = False) -> float:
    """Save the trained adapter in PEFT's format, for the pristine base.

    Without an offset this is the adapter as it is. With one, the change of the base is c B A - X0 of rank 2r: it is
    saved exactly, as an adapter of rank 2r, or truncated to rank r. Heads and other `modules_to_save` come along.

    The LoRA adapter of a diffusers UNet is also written as `pytorch_lora_weights.safetensors`, which the pipelines'
    `load_lora_weights(folder)` takes, and, if it is no DoRA, with kohya's names as `kohya_lora.safetensors`.

    Args:
        model: The adapted model.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go; replaced as a whole once all is
            written.
        truncated: Cut each change to the rank it was trained with.

    Returns:
        The largest relative truncation error of any layer, in Frobenius norm; 0 for an exact export.

    Raises:
        UserError: If the model holds no trainable pair or trains several adapters, if its initialisation changed the
            base, or if the folder holds other things.
    """
    peft_config = getattr(model, "peft_config", None)
    if peft_config is None:
        raise UserError("only a model that PEFT adapted can be exported: it has no peft_config")
    found = scan(model)
    pairs = found.pairs if found.others else find_pairs(model)  # VeRA, say, trains without a pair
    adapters = sorted({pair.adapter for pair in pairs}) or list(peft_config)
    if len(adapters) > 1:
        raise UserError(f"several adapters train ({', '.join(adapters)}): export one at a time, after set_adapter")
    config = copy(peft_config[adapters[0]])
    state = get_peft_model_state_dict(model, adapter_name=adapters[0], save_embedding_layers=False)
    shifted = [pair for pair in pairs if offset_factors(pair) is not None]
    _settle_start(config, shifted=bool(shifted))
    worst = 0.0
    ranks, alphas = _ranks_and_alphas(model, adapters[0])
    if shifted:
        for pair in shifted:
            left, right = update_factors(pair)
            if truncated:
                left, right, error = truncate(left, right, pair.shape[2])
                worst = max(worst, error)
            _replace_factors(state, pair, left, right)
            # these factors carry their scale themselves, so alpha = r
            ranks[pair.name] = alphas[pair.name] = left.shape[1]
        _set_ranks(config, ranks, alphas)
    config.inference_mode = True
    if not isinstance(model, PeftModel):
        state = {f"{_PEFT_PREFIX}{key}": value for key, value in state.items()}
    # clones, for safetensors refuses tied tensors
    state = {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}

    def write(new: Path) -> None:
        config.save_pretrained(str(new))
        save_file(state, new / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if is_diffusers_unet(model):
            write_diffusers_files(new, config, *(_without_prefix(part) for part in (state, ranks, alphas)))

    _write(Path(folder), write)
    return worst


def _without_prefix(named: dict[str, Any]) -> dict[str, Any]:
    """Entries by their names in the base model."""
    return {name.removeprefix(_PEFT_PREFIX): value for name, value in named.items()}


def _settle_start(config: LoraConfig, *, shifted: bool) -> None:
    """Keep what made the factors at the start from running again at loading, unless it also makes the base.

    Raises:
        UserError: If the initialisation changed the base in a way that loading cannot repeat.
    """
    start = getattr(config, "init_lora_weights", None)
    if start is None:
        return  # another method than LoRA
    if start in ("pissa", "olora") and not shifted:
        return  # PEFT subtracts its start from the base again at loading
    if isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise UserError(
            f"init_lora_weights={start!r} changed the base, so no adapter fits the pristine one: merge instead"
        )
    config.init_lora_weights = True


def _ranks_and_alphas(model: nn.Module, adapter: str) -> tuple[dict[str, int], dict[str, float]]:
    """The rank of every layer's adapter, and the alpha that gives its scaling without rslora, by the layer's name."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter in m.scaling}
    ranks = {name: layer.r[adapter] for name, layer in layers.items()}
    return ranks, {name: layer.scaling[adapter] * ranks[name] for name, layer in layers.items()}


def _set_ranks(config: LoraConfig, ranks: dict[str, int], alphas: dict[str, float]) -> None:
    """Write ranks and alphas by name into a configuration: the largest rank as the rule, the rest as patterns."""
    config.r = config.lora_alpha = max(ranks.values())
    config.use_rslora = False
    patterns = {name: f"^{re.escape(name.removeprefix(_PEFT_PREFIX))}" for name in ranks}
    config.rank_pattern = {patterns[name]: rank for name, rank in ranks.items() if rank != config.r}
    config.alpha_pattern = {patterns[name]: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def _replace_factors(state: dict[str, Tensor], pair: LoraPair, left: Tensor, right: Tensor) -> None:
    """Put factors (m, k), (k, n) in the place of a pair's, in the shapes PEFT gives them."""
    for name, factor, new in (("A", pair.a, right), ("B", pair.b, left)):
        embedding = pair.adapter in pair.layer.lora_embedding_A
        key = f"{pair.name}.lora_embedding_{name}" if embedding else f"{pair.name}.lora_{name}.weight"
        assert key in state, key
        shape = (len(new), *factor.shape[1:]) if name == "A" else (*new.shape, *factor.shape[2:])
        state[key] = new.reshape(shape).to(factor.dtype)
    bias = f"{pair.name}.lora_B.bias"  # of lora_bias, which PEFT scales like the product
    if bias in state:
        state[bias] = pair.scaling * state[bias]


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    """Write all files into a folder beside the goal first, so that nothing half written is left under its name."""
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and {entry.name for entry in folder.iterdir()} <= _ADAPTER_FILES):
        raise UserError(f"{folder} holds something that is not an adapter: choose an empty or a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # what is new, and in it, while the two change places, what was there before
    prefix = f".{folder.name}.partial-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        new, old = partial / "new", partial / "old"
        write(new)
        if folder.exists():
            folder.replace(old)
        try:
            new.replace(folder)
        except OSError:
            if old.exists():
                old.replace(folder)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):  # by an export that was killed; now there is a whole one
        shutil.rmtree(left, ignore_errors=True)


def merge_adapter(model: PeftModel) -> nn.Module:
    """The base model with its active adapter merged into its weights: an ordinary model without a trace of PEFT.

    The base may carry an offset: W - X0 + c B A is the weight that was trained. The adapted model is used up.

    Raises:
        UserError: If the model is not a PeftModel, if the weight of a layer is another layer's too, or if PEFT cannot
            merge (grouped convolutions, say).
    """
    if not isinstance(model, PeftModel):
        raise UserError("only a PeftModel (get_peft_model) can be merged")
    for pair in with_shared_base(model, scan(model).pairs):
        raise UserError(
            f"layer {pair.name} shares its base weight with another layer, which merging would change too: export the "
            "adapter instead"
        )
    try:
        merged = model.merge_and_unload()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(f"PEFT cannot merge this adapter, export it instead: {error}") from error
    untrack_offsets(merged)
    return merged
