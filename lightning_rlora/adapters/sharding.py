"""A frozen base that is sharded over processes by FSDP2, beside adapters that are whole in every process.

An adapter is small beside its base (a thousandth of an 8B model, 42 million numbers at rank 16) while a step on the
manifold looks at whole factors. So only what is frozen is sharded: each process holds the whole adapter, gets the mean
of the factors' gradients once a step, and takes the same step as the others.
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lightning_rlora.adapters.adapt import find_adapted
from lightning_rlora.adapters.state import adapter_keys
from lightning_rlora.errors import UserError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that a model says are to stay together, transformer blocks as a rule; inner ones come first."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


def shard_base(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of an adapted model, block by block; what trains, and its checkpoint, stays whole.

    Does nothing to a model that is sharded already.

    Args:
        module: A model that PEFT adapted, or a module that contains one.
        mesh: The processes that share the base, in one dimension.

    Raises:
        UserError: If the base is quantised.
    """
    adapted: Any = find_adapted(module)
    base = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    if is_sharded(base):
        return
    keys = adapter_keys(adapted)
    whole = {p for name, p in adapted.named_parameters(remove_duplicate=False) if name in keys}
    if not all(p.is_floating_point() for p in base.parameters()):
        raise UserError(
            "a quantised base cannot be sharded: use strategy ddp, with which every process holds all of it"
        )
    for part in [*blocks(base), base]:
        # Weights that are adapted may be shifted between two passes, so none may be left gathered, not the root's.
        fully_shard(part, mesh=mesh, ignored_params=whole, reshard_after_forward=True)


def is_sharded(module: nn.Module) -> bool:
    """Whether some of a model's weights are sharded, so that all processes must run it together."""
    return any(isinstance(part, FSDPModule) for part in module.modules())
