"""Taking an adapter out: PEFT's format for the pristine base, or an ordinary model with the adapter merged in."""

import shutil
import tempfile
from copy import copy
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_rlora.adapters.offset import offset_factors
from lightning_rlora.adapters.pairs import LoraPair, find_pairs, matrix
from lightning_rlora.errors import UserError


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

    Args:
        model: The adapted model.
        folder: Where `adapter_config.json` and `adapter_model.safetensors` go; replaced as a whole once both are
            written.
        truncated: Cut each change to the rank it was trained with.

    Returns:
        The largest relative truncation error of any layer, in Frobenius norm; 0 for an exact export.

    Raises:
        UserError: If the model holds no trainable pair.
    """
    pairs = find_pairs(model)
    adapter = pairs[0].adapter
    peft_config = getattr(model, "peft_config", None)
    if peft_config is None:
        raise UserError("only a model that PEFT adapted can be exported: it has no peft_config")
    config = copy(peft_config[adapter])
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    worst = 0.0
    if any(offset_factors(pair) is not None for pair in pairs):
        ranks = {}
        for pair in pairs:
            left, right = update_factors(pair)
            if truncated:
                left, right, error = truncate(left, right, pair.shape[2])
                worst = max(worst, error)
            ranks[pair.name] = left.shape[1]
            _replace_factors(state, pair, left, right)
        # every factor now carries its scale itself, so alpha = r everywhere
        names = {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}
        config.r = config.lora_alpha = max(ranks.values())
        config.use_rslora = False
        config.rank_pattern = {f"^{name}": rank for name, rank in names.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
    config.init_lora_weights = True  # what made the factors at the start must not run again at loading
    config.inference_mode = True
    if not isinstance(model, PeftModel):
        state = {f"base_model.model.{key}": value for key, value in state.items()}
    _write(Path(folder), config, state)
    return worst


def _replace_factors(state: dict[str, Tensor], pair: LoraPair, left: Tensor, right: Tensor) -> None:
    """Put factors (m, k), (k, n) in the place of a pair's, in the shapes PEFT gives them."""
    for name, factor, new in (("A", pair.a, right), ("B", pair.b, left)):
        embedding = pair.adapter in pair.layer.lora_embedding_A
        key = f"{pair.name}.lora_embedding_{name}" if embedding else f"{pair.name}.lora_{name}.weight"
        assert key in state, key
        shape = (len(new), *factor.shape[1:]) if name == "A" else (*new.shape, *factor.shape[2:])
        state[key] = new.reshape(shape).to(factor.dtype)


def _write(folder: Path, config: object, state: dict[str, Tensor]) -> None:
    """Write both files into a folder beside the goal first, so that nothing half written is left under its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and any(folder.iterdir()) and not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder} holds something that is not an adapter: choose an empty or a new folder")
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        config.save_pretrained(partial)  # type: ignore[attr-defined]
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        partial.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def merge_adapter(model: PeftModel) -> nn.Module:
    """The base model with every adapter merged into its weights: an ordinary model without a trace of PEFT.

    The base may carry an offset: W - X0 + c B A is the weight that was trained. The adapted model is used up.

    Raises:
        UserError: If the model is not a PeftModel.
    """
    if not isinstance(model, PeftModel):
        raise UserError("only a PeftModel (get_peft_model) can be merged")
    return model.merge_and_unload()
