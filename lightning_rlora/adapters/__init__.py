"""PEFT's adapters as points of the fixed-rank manifold: finding, reading, writing, saving them."""

from lightning_rlora.adapters.adapt import (
    PeftConfig,
    adapt,
    adapter_config,
    config_fields,
    find_adapted,
    float32_heads,
    load_adapter,
)
from lightning_rlora.adapters.base_size import base_size
from lightning_rlora.adapters.data_starts import EVA, CorDA
from lightning_rlora.adapters.export import export_adapter, merge_adapter
from lightning_rlora.adapters.gauge import (
    balanced_factors,
    group_by_shape,
    read_point,
    read_points,
    refuse_trained,
    write_point,
)
from lightning_rlora.adapters.input_casts import leave_casts_to_autocast
from lightning_rlora.adapters.offset import (
    BaseOffset,
    check_shiftable,
    get_offset,
    offset_factors,
    subtract_start,
    track_offsets,
)
from lightning_rlora.adapters.pairs import LoraPair, LoraScan, find_pairs, matrix, scan
from lightning_rlora.adapters.sharding import is_sharded, root_gathered, shard_base, unwrapped, wrap_base
from lightning_rlora.adapters.starts import LoftQ, OLoRA, Passes, PiSSA, Start, Stiefel, renew_magnitude
from lightning_rlora.adapters.state import adapter_keys, check_adapter, keep_adapter, read_checkpoint

__all__ = [
    "EVA",
    "BaseOffset",
    "CorDA",
    "LoftQ",
    "LoraPair",
    "LoraScan",
    "OLoRA",
    "Passes",
    "PeftConfig",
    "PiSSA",
    "Start",
    "Stiefel",
    "adapt",
    "adapter_config",
    "adapter_keys",
    "balanced_factors",
    "base_size",
    "check_adapter",
    "check_shiftable",
    "config_fields",
    "export_adapter",
    "find_adapted",
    "find_pairs",
    "float32_heads",
    "get_offset",
    "group_by_shape",
    "is_sharded",
    "keep_adapter",
    "leave_casts_to_autocast",
    "load_adapter",
    "matrix",
    "merge_adapter",
    "offset_factors",
    "read_checkpoint",
    "read_point",
    "read_points",
    "refuse_trained",
    "renew_magnitude",
    "root_gathered",
    "scan",
    "shard_base",
    "subtract_start",
    "track_offsets",
    "unwrapped",
    "wrap_base",
    "write_point",
]
