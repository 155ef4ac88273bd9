"""LoRA-GA: factors from the singular vectors of the loss gradient."""

import torch
from torch import nn

from lightning_rlora.adapters import LoraPair, Passes, Start
from lightning_rlora.adapters.probes import probing
from lightning_rlora.collectives import average_gradients
from lightning_rlora.errors import UserError
from lightning_rlora.init.gradient_triplets import check_ranks, gradient_triplets


class LoRAGA(Start):
    """Singular vectors of the loss gradient, so that the first step is close to full fine-tuning's (arXiv 2407.05000).

    With the triplets (U, S, V) of the mean gradient G (m x n) and the paper's stable scale,

        A = m^(1/4) / sqrt(gamma) V_{1..r}^T,    B = m^(1/4) / sqrt(gamma) U_{r+1..2r},

    so that all singular values of c B A are c sqrt(m) / gamma, whatever the scale of the loss. G is never formed: its
    triplets come out of 2 (power_steps + 1) passes over the batches, as in `LocallyOptimalInit`. (PEFT's own start of
    the name multiplies B by singular values of G and leaves A unscaled.)

    Args:
        batches: Number of training batches, of each process, whose mean gradient is used.
        stable_gamma: gamma; larger is a smaller start. The default is the authors'.
        oversampling: Extra columns of the sketches beyond 2r.
        power_steps: Power iterations; each costs two more passes.
    """

    def __init__(
        self, batches: int = 8, stable_gamma: float = 16.0, oversampling: int = 16, power_steps: int = 1
    ) -> None:
        if batches < 1 or not stable_gamma > 0 or oversampling < 0 or power_steps < 0:
            raise UserError("LoRAGA needs batches >= 1, stable_gamma > 0, oversampling >= 0 and power_steps >= 0")
        self.batches = batches
        self.stable_gamma = stable_gamma
        self.oversampling = oversampling
        self.power_steps = power_steps

    def set_factors(self, model: nn.Module, pairs: list[LoraPair], passes: Passes, generator: torch.Generator) -> None:
        """Run the passes and set every pair."""
        check_ranks(pairs, "LoRA-GA")

        def backward() -> None:
            for batch in passes.batches:
                (passes.loss(batch) / len(passes.batches)).backward()
            average_gradients(model.parameters())

        with probing(model, pairs, backward) as probes:
            triplets, _ = gradient_triplets(pairs, probes, self.oversampling, self.power_steps, generator)
        with torch.no_grad():
            for pair, (u, _, v) in zip(pairs, triplets, strict=True):
                m, _, r = pair.shape
                size = m**0.25 / self.stable_gamma**0.5
                pair.a.copy_((size * v[:, :r].mT).reshape(pair.a.shape))
                pair.b.copy_((size * u[:, r : 2 * r]).reshape(pair.b.shape))
