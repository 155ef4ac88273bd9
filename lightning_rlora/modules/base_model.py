"""Loading pretrained models and tokenizers, with one clear line where that fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_rlora.assets import resolve
from lightning_rlora.collectives import local_rank
from lightning_rlora.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_base(base: str, *, dtype: str, quantization: str | None, trust_remote_code: bool) -> "PreTrainedModel":
    """A causal language model from the hub, a folder or the package.

    Args:
        base: Hub id, folder, or `embedded:` name.
        dtype: Name of the weights' torch dtype.
        quantization: `4bit`, `8bit` or None.
        trust_remote_code: Run code from the model's repository.

    Raises:
        UserError: If there is no such model, its files are broken, or it is not a causal language model.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, base, dtype, quantization, trust_remote_code)[0]


def load_classifier(
    base: str,
    class_names: Sequence[str],
    *,
    dtype: str,
    quantization: str | None,
    trust_remote_code: bool,
) -> tuple["PreTrainedModel", list[str]]:
    """A sequence classification model from the hub, a folder or the package.

    Args:
        base: Hub id, folder, or `embedded:` name of an encoder or a decoder, with a head for as many classes or without
            one; what is missing is initialised from torch's global random state.
        class_names: Names of the classes, or none for a single number (regression).
        dtype: Name of the weights' torch dtype.
        quantization: `4bit`, `8bit` or None.
        trust_remote_code: Run code from the model's repository.

    Returns:
        The model, and the paths of its modules whose weights the base lacks: the head, and whatever pools for it.

    Raises:
        UserError: If there is no such model, its files are broken, or it cannot classify so many classes.
    """
    from transformers import AutoModelForSequenceClassification

    labels: dict[str, Any] = {"problem_type": "regression", "num_labels": 1}
    if class_names:
        numbers = {name: number for number, name in enumerate(class_names)}
        names = {number: name for name, number in numbers.items()}
        labels = {"problem_type": "single_label_classification", "id2label": names, "label2id": numbers}
    auto_class = AutoModelForSequenceClassification
    model, missing = _load(auto_class, base, dtype, quantization, trust_remote_code, **labels)
    return model, sorted({key.rpartition(".")[0] for key in missing})


def _load(
    auto_class: Any, base: str, dtype: str, quantization: str | None, trust_remote_code: bool, **config: Any
) -> tuple["PreTrainedModel", list[str]]:
    """A pretrained model, with some fields of its configuration set, and the keys of the weights it lacks."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code, **config}
    if quantization is not None:
        options |= {"quantization_config": _quantization_config(quantization, options["dtype"])}
        # transformers would load, and quantise, the bases of all processes of a node on its first GPU
        gpus = torch.cuda.device_count()
        options["device_map"] = {"": local_rank() % gpus if gpus else "cpu"}
    try:
        model, info = auto_class.from_pretrained(resolve(base), output_loading_info=True, **options)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise UserError(_explain(base, error)) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":
            raise UserError(_explain(base, error)) from error
        raise
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            # bitsandbytes repacks 4-bit weights at the first evaluation on such processors, and cannot train them after
            layer.support_avx512bf16_for_cpu = False
    return model, info["missing_keys"]


def load_tokenizer(base: str, *, trust_remote_code: bool, ends_text: bool = True) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base model; a missing padding token becomes the end-of-text token.

    Args:
        base: Hub id, folder, or `embedded:` name.
        trust_remote_code: Run code from the tokenizer's repository.
        ends_text: Whether an end-of-text token is needed.

    Raises:
        UserError: If there is none, or it lacks a token that is needed.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(base), trust_remote_code=trust_remote_code)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(_explain(base, error)) from error
    if ends_text and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {base!r} has no end-of-text token, which training needs to end answers with")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"the tokenizer of {base!r} has neither a padding nor an end-of-text token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage=dtype,  # the same bytes, which FSDP1 shards beside the other weights
        )
    return BitsAndBytesConfig(load_in_8bit=True)


def _explain(base: str, error: Exception) -> str:
    """One line on why a base could not be loaded."""
    if not base.startswith("embedded:") and not Path(base).exists():
        return f"cannot load the base model {base!r}: no such folder, and not to be had from the hub ({_short(error)})"
    return f"cannot load the base model {base!r}: {_short(error)}"


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:200] + " ..."
