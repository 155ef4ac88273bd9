"""Finding the tokenizer, and what is known about it."""

from typing import Any

from lightning_rlora.errors import UserError


def find_tokenizer(given: Any, module: Any) -> Any:
    """Takes the tokenizer object that was given, loads the one that was named, or takes the model's own.

    Args:
        given: A tokenizer, the name of one or None.
        module: The LightningModule, or None.

    Raises:
        UserError: There is none, or it cannot be loaded.
    """
    if isinstance(given, str):
        return _load_tokenizer(given)
    found = getattr(module, "tokenizer", None) if given is None else given
    if found is None:
        raise UserError("the model brings no tokenizer: give the data module a `tokenizer`")
    return found


def check_length(max_length: int, tokenizer: Any, module: Any) -> None:
    """Refuses rows that are longer than the model or its tokenizer is known to take."""
    limits = {
        "model": getattr(getattr(getattr(module, "model", None), "config", None), "max_position_embeddings", None),
        "tokenizer": tokenizer.model_max_length,  # 1e30 if it knows of none
    }
    for name, limit in limits.items():
        if isinstance(limit, int) and max_length > limit:
            raise UserError(f"max_length is {max_length}, but the {name} takes at most {limit} tokens")


def pad_token(tokenizer: Any) -> int:
    """Gives the token that fills rows up; any will do, for it is masked."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from lightning_rlora.assets import resolve

    try:
        return AutoTokenizer.from_pretrained(resolve(name))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"no tokenizer {name!r}, neither as a folder nor on the hub: {reason}") from error
