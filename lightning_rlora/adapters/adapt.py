"""Putting a PEFT adapter on a model: a new one from its configuration, or a saved one to train further."""

import inspect
import json
import pickle
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

from peft import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    ModulesToSaveWrapper,
    get_peft_model_state_dict,
    load_peft_weights,
)
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_rlora.errors import UserError

_STARTS = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "lora_ga": "LoRAGA",
    "eva": "EVA",
    "corda": "CorDA",
}
"""PEFT's values of init_lora_weights that change the base or need data, and the classes that stand for them."""


def adapter_config(fields: Mapping[str, Any]) -> PeftConfig:
    """PEFT's configuration object from its fields, named as in adapter_config.json; `peft_type` is LORA if absent.

    Raises:
        UserError: If the type or a field is unknown, or a value is refused by PEFT.
    """
    fields = dict(fields)
    kind = fields.pop("peft_type", "LORA")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(getattr(kind, "value", kind))
    if config_class is None:
        raise UserError(
            f"unknown peft_type {kind!r} of the adapter: {_suggest(str(kind), PEFT_TYPE_TO_CONFIG_MAPPING)}"
        )
    known = inspect.signature(config_class).parameters
    for field in fields:
        if field not in known:
            raise UserError(f"{config_class.__name__} has no field {field!r}: {_suggest(field, known)}")
    try:
        return config_class(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise UserError(f"the adapter's configuration is not valid: {_one_line(error)}") from error


def config_fields(config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT configuration as plain data, from which `adapter_config` makes it again."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, set):
            return sorted(value)
        return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value

    fields = {name: plain(value) for name, value in config.to_dict().items()}
    known = inspect.signature(type(config)).parameters
    return {name: value for name, value in fields.items() if name == "peft_type" or name in known}


def adapt(model: nn.Module, config: PeftConfig) -> PeftModel:
    """A new adapter on a pretrained model, with its factors in float32 and the base frozen.

    Raises:
        UserError: If PEFT refuses, for unknown target modules or a rank of zero, say; if the base has nothing of what
            is to be trained as a whole; or if the configuration asks for a start that changes the base or needs data.
    """
    start = getattr(config, "init_lora_weights", None)
    for name, wanted in _STARTS.items():
        if isinstance(start, str) and start.lower().startswith(name):
            raise UserError(
                f"init_lora_weights={start!r} runs when training starts, so that checkpoints can follow it: leave it "
                f"out, and add the callback AdapterInit with start {wanted}"
            )
    _check_modules_to_save(model, config)
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, re.error) as error:
        raise UserError(f"the adapter does not fit the base model: {_one_line(error)}") from error


def _check_modules_to_save(model: nn.Module, config: PeftConfig) -> None:
    """Refuse names of what is to be trained as a whole that PEFT would pass over without a word."""
    whole = set(getattr(config, "modules_to_save", None) or [])
    if config.task_type in ("SEQ_CLS", "TOKEN_CLS"):
        whole -= {"classifier", "score"}  # PEFT names both for every classifier, whichever there is
    names = [name for name, _ in model.named_modules()]
    if missing := [wanted for wanted in sorted(whole) if not any(name.endswith(wanted) for name in names)]:
        last = sorted({name.rpartition(".")[2] for name in names} - {""})
        there = ", ".join(name for name in last if not name.isdigit())
        raise UserError(
            f"modules_to_save names {', '.join(missing)}, which the base model lacks: its parts are {there}"
        )


def load_adapter(model: nn.Module, folder: str | Path) -> PeftModel:
    """A saved adapter in PEFT's format on a pretrained model, to be trained further.

    Raises:
        UserError: If the folder holds no adapter, a broken one, or one for another base model.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter: there is no adapter_config.json in it")
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise UserError(f"the adapter in {folder} has no weights: there is no {SAFETENSORS_WEIGHTS_NAME} in it")
    try:
        adapted = PeftModel.from_pretrained(model, folder, is_trainable=True)
        saved = _factor_keys(load_peft_weights(str(folder), device="cpu"))
    except (SafetensorError, json.JSONDecodeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"the adapter in {folder} is broken: {_one_line(error)}") from error
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"the adapter in {folder} does not fit the base model: {_one_line(error)}") from error
    # PEFT only warns of factors that find no place or get no values
    odd = saved ^ _factor_keys(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if odd:
        raise UserError(f"the adapter in {folder} does not fit the base model: {min(odd)} is in only one of them")
    return adapted


def float32_heads(model: nn.Module) -> None:
    """Keep what is trained and saved as a whole (PEFT's `modules_to_save`) in float32, as the factors are.

    Their inputs are cast, so that they stand behind a half-precision base without autocast too.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for head in wrapper.modules_to_save.values():
                head.float().register_forward_pre_hook(_cast_inputs)


def _cast_inputs(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def find_adapted(module: nn.Module) -> nn.Module:
    """The outermost model inside a module that PEFT adapted.

    Raises:
        UserError: If there is none.
    """
    for candidate in module.modules():
        if isinstance(getattr(candidate, "peft_config", None), dict):
            return candidate
    raise UserError(f"{type(module).__name__} contains no model that PEFT adapted: use get_peft_model")


def _suggest(name: str, known: Iterable[str]) -> str:
    """What may have been meant, or all there is."""
    values = [str(getattr(k, "value", k)) for k in known]  # PEFT's types are an enumeration
    names = {value.lower(): value for value in values}
    close = [names[match] for match in get_close_matches(name.lower(), names, cutoff=0.5)]
    return f"do you mean {' or '.join(close)}?" if close else f"it knows {', '.join(sorted(names.values()))}"


def _factor_keys(state_dict: Mapping[str, Any]) -> set[str]:
    return {key for key in state_dict if ".lora_" in key}


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " ..."
