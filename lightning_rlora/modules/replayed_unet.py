"""A UNet's passes replayed from CUDA graphs: launched from Python they take up to three times as long."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn


class ReplayedUNet:
    """A UNet whose passes are recorded once for every shape of its inputs, and replayed from then on.

    Recorded kernels read weights and factors where they lie: what optimizers do to them in place is seen, other tensors
    in their place are not. The graphs share their memory, so a result is good until the next call, and its backward
    pass has to come before that. Gradients lie in that memory, too: `own_gradients` takes them out of it.

    Args:
        unet: The UNet with its adapter, on a CUDA device. What trains is settled by then.
    """

    def __init__(self, unet: nn.Module) -> None:
        self._unet = unet
        self._trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        self._recorded: dict[Hashable, Callable[..., Tensor]] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, noisy: Tensor, times: Tensor, told: dict[str, Any]) -> Tensor:
        """The prediction for noisy latents, of their shape.

        Args:
            noisy: Latents (B, C, h, w).
            times: Their times, (B,).
            told: The UNet's other arguments, see `conditions`.
        """
        tensors = {"encoder_hidden_states": told["encoder_hidden_states"], **told.get("added_cond_kwargs", {})}
        inputs = (noisy, times, *tensors.values())
        kind = self._unet.training, torch.is_grad_enabled(), *((x.shape, x.dtype) for x in inputs)
        if kind not in self._recorded:
            self._recorded[kind] = self._record(inputs, list(tensors))
        return self._recorded[kind](*inputs)

    def _record(self, inputs: tuple[Tensor, ...], names: list[str]) -> Callable[..., Tensor]:
        call = _Call(self._unet, names)
        examples = tuple(x.clone() for x in inputs)  # where every later call puts its own
        device = inputs[0].device
        # a weight that autocast has cast before must be cast inside the graph, or its value would stay
        dtype = torch.get_autocast_dtype("cuda")
        autocast = torch.autocast("cuda", dtype, enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False)
        # torch runs the passes a few times first, for which dropout draws: a resumed run records at another step
        with autocast, torch.random.fork_rng([device] if device.type == "cuda" else []):
            made = torch.cuda.make_graphed_callables(call, examples, allow_unused_input=True, pool=self._memory)
        return cast(Callable[..., Tensor], made)

    def own_gradients(self) -> None:
        """Puts gradients into memory of their own, before the next backward pass writes to where they are now."""
        reached = [parameter for parameter in self._trained if parameter.grad is not None]
        if not reached:
            return
        # one kernel for all copies
        copies = torch._foreach_mul([parameter.grad for parameter in reached], 1.0)  # type: ignore[misc]
        for parameter, gradient in zip(reached, copies, strict=True):
            parameter.grad = gradient


class _Call(nn.Module):
    """The UNet as a function of tensors alone."""

    def __init__(self, unet: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.unet = unet
        self.training = unet.training  # torch replays a module in the mode alone in which it was recorded
        self._names = names

    def forward(self, noisy: Tensor, times: Tensor, hidden: Tensor, *added: Tensor) -> Tensor:
        told: dict[str, Any] = {"encoder_hidden_states": hidden}
        if added:
            told["added_cond_kwargs"] = dict(zip(self._names[1:], added, strict=True))
        prediction: Tensor = self.unet(noisy, times, **told).sample
        return prediction
