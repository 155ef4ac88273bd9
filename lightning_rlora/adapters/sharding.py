"""A frozen base that is sharded over processes by FSDP2, beside adapters that are whole in every process.

An adapter is small beside its base (a thousandth of an 8B model, 42 million numbers at rank 16) while a step on the
manifold looks at whole factors. So only what is frozen is sharded: each process holds the whole adapter, gets the mean
of the factors' gradients once a step, and takes the same step as the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from weakref import ref

from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import CustomPolicy

from lightning_rlora.adapters.adapt import find_adapted
from lightning_rlora.adapters.pairs import FSDP1, FSDP1_UNIT
from lightning_rlora.adapters.state import adapter_keys
from lightning_rlora.errors import UserError


def blocks(model: nn.Module) -> list[nn.Module]:
    """The parts that a model of transformers or diffusers names as units, its blocks; inner ones come first.

    A model that names none is gathered as a whole in every pass.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names][::-1]


def shard_base(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the frozen weights of an adapted model by FSDP2, block by block; what trains stays whole.

    Does nothing to a model that is sharded already.

    Args:
        module: A model that PEFT adapted, or a module that contains one.
        mesh: The processes that share the base, in one dimension.

    Raises:
        UserError: If the base is quantised in another way than bitsandbytes' 4 bits.
    """
    if is_sharded(module):
        return
    base, whole = _base_and_whole(module)
    units = blocks(base)
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=whole, reshard_after_forward=True)
    # What is left, embeddings and head, ends the forward pass and begins the backward pass: it stays gathered between
    # them. Not where some of it is adapted, since weights that are adapted may be shifted between two passes (a head
    # that trains as a whole is not shifted, but is not told apart here).
    adapted_outside = bool(whole.difference(*(unit.parameters() for unit in units)))
    fully_shard(base, mesh=mesh, ignored_params=whole, reshard_after_forward=adapted_outside)
    _gather_ahead(base)


def _gather_ahead(base: nn.Module) -> None:
    """Let each block ask for the next one's weights before it computes; FSDP2 asks when the host reaches the next."""
    for stack in base.modules():
        if isinstance(stack, nn.ModuleList):
            for block, following in pairwise(stack):
                if isinstance(block, FSDPModule) and isinstance(following, FSDPModule):
                    block.set_modules_to_forward_prefetch([following])


def wrap_base(module: nn.Module, **options: Any) -> None:
    """The same by FSDP1, which puts wrappers around the blocks and the base.

    Args:
        module: A module that contains a model that PEFT adapted.
        options: Of FullyShardedDataParallel.

    Raises:
        UserError: If the base is quantised in another way than bitsandbytes' 4 bits, or its dtypes are mixed.
    """
    if is_sharded(module):
        return
    base, whole = _base_and_whole(module)
    together = set(blocks(base))
    try:
        wrapped = FullyShardedDataParallel(
            base,
            ignored_states=whole,
            use_orig_params=True,
            auto_wrap_policy=CustomPolicy(lambda part: part in together),
            **options,
        )
    except ValueError as error:
        if "dtype" not in str(error):
            raise
        # it lays the weights of a block in one row, which has one dtype
        raise UserError(f"FSDP1 cannot shard this base ({error}): use strategy fsdp2") from error
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if child is base and parent is not wrapped:
                setattr(parent, name, wrapped)
    for unit in FullyShardedDataParallel.fsdp_modules(wrapped):
        for layer in unit.modules():  # inner units come later
            # weak: no submodules of their own submodule, and no part of a layer's copy
            setattr(layer, FSDP1_UNIT, (ref(unit), ref(wrapped)))
        _leave_state_dict_alone(unit)


def _leave_state_dict_alone(unit: nn.Module) -> None:
    """Make a state dict show what a process holds, by the paths of the model without FSDP1.

    FSDP1 gathers the base for every state dict, for which all processes would have to ask together.
    """
    for hooks in ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        getattr(unit, hooks).clear()
    unit._load_state_dict_post_hooks.clear()

    def unwrap(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}{FSDP1}.")]:
            state_dict[prefix + key.removeprefix(f"{prefix}{FSDP1}.")] = state_dict.pop(key)

    def wrap(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}{FSDP1}.{key.removeprefix(prefix)}"] = state_dict.pop(key)

    unit._register_state_dict_hook(unwrap)
    unit.register_load_state_dict_pre_hook(wrap)


def _base_and_whole(module: nn.Module) -> tuple[Any, set[nn.Parameter]]:
    """The base that is to be sharded, and the parameters in it that are not."""
    adapted: Any = find_adapted(module)
    base = adapted.get_base_model() if isinstance(adapted, PeftModel) else adapted
    # in 4 bits bitsandbytes' layers keep the scales of their weights; in 8 bits the weights do, and lose them
    if not all(p.is_floating_point() or hasattr(p, "quant_state") for p in base.parameters()):
        raise UserError(
            "a base quantised in another way than bitsandbytes' 4 bits cannot be sharded: use quantization 4bit, or "
            "strategy ddp, with which every process holds all of the base"
        )
    keys = adapter_keys(adapted)
    return base, {p for name, p in adapted.named_parameters(remove_duplicate=False) if name in keys}


@contextmanager
def unwrapped(module: nn.Module) -> Iterator[None]:
    """A model without FSDP1's wrappers for a while, to be looked at and not to be run."""
    wrappers = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, FullyShardedDataParallel)
    ]
    for parent, name, wrapper in wrappers:
        setattr(parent, name, wrapper.module)
    try:
        yield
    finally:
        for parent, name, wrapper in wrappers:
            setattr(parent, name, wrapper)


def is_sharded(module: nn.Module) -> bool:
    """Whether some of a model's weights are sharded, so that all processes must run it together."""
    return any(isinstance(part, FSDPModule | FullyShardedDataParallel) for part in module.modules())


@contextmanager
def root_gathered(module: nn.Module) -> Iterator[None]:
    """What FSDP1 shards outside of blocks, whole for a while: `generate` goes past the wrapper that would gather it."""
    with ExitStack() as stack:
        for root in FullyShardedDataParallel.fsdp_modules(module, root_only=True):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(root, recurse=False, writeback=False))
        yield
