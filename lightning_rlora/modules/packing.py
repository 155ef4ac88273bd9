"""Does a model keep packed documents apart?"""

from typing import Any

import torch

from lightning_rlora.errors import UserError


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # these shapes come once
def check_packing(model: Any) -> None:
    """Refuse a model in which a token sees the documents packed before its own.

    Position ids that restart at each document tell transformers where to cut the attention. Not every architecture
    listens, so two short documents are run packed and apart.

    Args:
        model: A causal language model, in training or evaluation mode.

    Raises:
        UserError: If the logits of the second document depend on the first.
    """
    modes = {module: module.training for module in model.modules()}  # not all need be the same
    model.eval()
    ids = torch.arange(12, device=model.device).view(1, 12) % model.config.get_text_config().vocab_size
    positions = torch.arange(6, device=model.device).repeat(2).view(1, 12)
    try:
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:].float()
        alone = model(input_ids=ids[:, 6:], use_cache=False).logits.float()
    finally:
        for module, mode in modes.items():
            module.training = mode
    # rounding in bfloat16 stays near 1 % of the largest logit; architectures that do not listen differ by 10 % and more
    if (packed - alone).abs().max() > 0.05 * alone.abs().max():
        raise UserError(
            f"{model.config.model_type} models let packed documents see each other: set data.packing to false"
        )
