"""Fine-tuning a text-to-image diffusion model, with a PEFT adapter of its UNet on the fixed-rank manifold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from lightning_rlora.adapters import PeftConfig, config_fields, merge_adapter
from lightning_rlora.errors import UserError
from lightning_rlora.modules.adapted_model import AdaptedModel
from lightning_rlora.modules.conditions import Conditions, check_lengths
from lightning_rlora.modules.diffusion_pipeline import load_pipeline
from lightning_rlora.modules.latents import LatentCache
from lightning_rlora.modules.noise_loss import add_noise, draw_noise, min_snr_weights, velocity, weighted_loss
from lightning_rlora.modules.replayed_unet import ReplayedUNet

if TYPE_CHECKING:
    from PIL.Image import Image

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The projections of every attention layer of a UNet: what is adapted if nothing else is asked for."""


class Denoising(NamedTuple):
    """A UNet's answer to noisy latents.

    Attributes:
        prediction: What it took for the noise, or the velocity, (B, C, h, w).
        target: What it was, the same shape, float32.
        alpha_bar: Cumulative product a of the schedule at each example's time, (B,).
    """

    prediction: Tensor
    target: Tensor
    alpha_bar: Tensor


class TextToImage(AdaptedModel):
    """A latent diffusion model whose UNet's adapter is trained; all else is frozen and never stored in a checkpoint.

    Any pipeline of the layout of Stable Diffusion 1.5, 2 or XL; whether it predicts noise or velocity is read from its
    scheduler's configuration. Noise and times of the training follow from torch's global random state, which
    checkpoints hold; those of the evaluation are always the same, so that `val/loss` compares from step to step.

    Subclasses change the loss by `loss`, the data by their DataModule, the optimizer by the factory or
    `configure_optimizers`.

    Batches are dictionaries: `pixel_values`, float32 (B, 3, H, W) in [-1, 1]; `prompt`, a list of B strings; and
    optionally `weight`, float32 (B,), of each example's loss; `key`, a list of B names of the exact pixels, under which
    latents are kept; `original_size` and `crop_top_left`, int64 (B, 2), for SDXL.

    Args:
        pipeline: Hub id or folder of a diffusers pipeline, or `embedded:tiny-diffusion`, the small one for 64 x 64
            pictures that comes with the package (`examples/tiny_diffusion/` made it).
        adapter: Fields of PEFT's configuration of the UNet's adapter, named as in adapter_config.json: `r`,
            `lora_alpha`, `target_modules` (the projections of every attention layer if left out; names or a pattern of
            convolutions and other linear layers go as well), ... From Python also a PeftConfig.
        adapter_path: Folder of a saved PEFT adapter to train further, in place of a new one.
        optimizer: Makes the optimizer from parameter groups; by default WhitenedRiemannion with its own defaults.
        lr_scheduler: Makes the learning-rate scheduler from the optimizer, stepped after each optimizer step. None
            stands for LinearWithWarmup over a twentieth of the run, torch's ConstantLR with a factor of 1 for a
            constant rate. If it has a `total_steps` that is None, the trainer's number of steps is filled in.
        lr_ratio: LoRA+: the learning rate of B over that of A, which is the optimizer's (see `lora_plus_groups`). Goes
            with optimizers of torch's kind, not with those that move A and B together.
        dtype: Of the frozen weights; the adapter's are float32 in any case.
        gradient_checkpointing: Recompute the UNet's activations in the backward pass to save memory.
        cuda_graphs: Replay the UNet's passes from CUDA graphs while it trains: the same numbers, up to rounding, in
            less time where a GPU waits for Python, as an H200 does with Stable Diffusion 1.5 for two thirds of a step.
            Every shape of batch is recorded when it first comes, which takes the memory of a step once more, and which
            a data loader that pins memory can disturb. For a single process, and not with gradient_checkpointing; where
            `training_step` is overridden, each forward pass needs its backward pass before the next one.
        min_snr_gamma: Bound of min-SNR weighting (arXiv 2303.09556); 5 is the authors' advice. By default every time
            counts the same.
        noise_offset: Strength of offset noise in training.
        cache_latents: Keep the latent of every `key` in the CPU's memory, so that the VAE sees a picture once.
        evaluation_draws: Noises and times that each evaluated picture is tried with.
        truncate_prompts: Cut prompts that are longer than the text encoder takes, where they would be refused.

    Raises:
        UserError: If the pipeline cannot be loaded, the adapter does not fit its UNet, or a number is out of range.
    """

    def __init__(
        self,
        pipeline: str = "embedded:tiny-diffusion",
        adapter: dict[str, Any] | PeftConfig | None = None,
        adapter_path: str | None = None,
        optimizer: Callable[[Iterable], Optimizer] | None = None,
        lr_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
        lr_ratio: float | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        cuda_graphs: bool = False,
        min_snr_gamma: float | None = None,
        noise_offset: float = 0.0,
        cache_latents: bool = True,
        evaluation_draws: int = 4,
        truncate_prompts: bool = False,
    ) -> None:
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise UserError(f"min_snr_gamma is {min_snr_gamma}: it must be positive, or null for no weighting")
        if noise_offset < 0:
            raise UserError(f"noise_offset is {noise_offset}: it must not be negative")
        if evaluation_draws < 1:
            raise UserError(f"evaluation_draws is {evaluation_draws}: it must be at least 1")
        if cuda_graphs and gradient_checkpointing:
            raise UserError("cuda_graphs cannot record recomputed activations: take it or gradient_checkpointing")
        if isinstance(adapter, PeftConfig):
            adapter = config_fields(adapter)
        loaded = load_pipeline(pipeline, dtype=dtype)
        if gradient_checkpointing:
            loaded.unet.enable_gradient_checkpointing()
        super().__init__(
            loaded.unet,
            task_type=None,
            adapter=adapter if adapter_path else _on_attention(adapter or {}),
            adapter_path=adapter_path,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            lr_ratio=lr_ratio,
            gradient_checkpointing=False,  # transformers' way, which a UNet does not know
            compile=False,
        )
        self.save_hyperparameters(ignore=["optimizer", "lr_scheduler"])
        # its UNet is the one with the adapter; the parts stand here too, so that they move to the module's device
        self.pipeline = loaded
        self.pipeline.set_progress_bar_config(disable=True)
        self.vae = loaded.vae
        self.text_encoder = loaded.text_encoder
        self.text_encoder_2 = getattr(loaded, "text_encoder_2", None)
        self.latents = LatentCache(loaded.vae, enabled=cache_latents)
        self.conditions = Conditions(loaded, truncate=truncate_prompts)
        self.cuda_graphs = cuda_graphs
        self._replayed: ReplayedUNet | None = None
        self.min_snr_gamma = min_snr_gamma
        self.noise_offset = noise_offset
        self.evaluation_draws = evaluation_draws
        self.truncate_prompts = truncate_prompts
        self.prediction = loaded.scheduler.config.get("prediction_type", "epsilon")

        from diffusers import DDPMScheduler

        # no buffer: a precision that casts the module would round what is close to 1
        self._alphas_cumprod: Tensor = DDPMScheduler.from_config(loaded.scheduler.config).alphas_cumprod
        self._losses = torch.nn.ModuleDict({stage: MeanMetric() for stage in ("val", "test")})

    def forward(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> Denoising:
        """The UNet's answer to the batch's latents under fresh noise.

        Args:
            batch: See the class.
            generator: Source of noise and times, without the offset noise of the training; by default one that the
                global state seeds, with other numbers in each process.

        Raises:
            UserError: If the batch is none of pictures and prompts, or a prompt is too long.
        """
        if not isinstance(batch, dict) or not {"pixel_values", "prompt"} <= batch.keys():
            raise UserError("a text-to-image model learns from pixel_values and prompt, which the data do not give")
        latents = self.latents(batch["pixel_values"], batch.get("key"))
        offset = self.noise_offset if generator is None else 0.0
        generator = generator or self._generator(latents.device)
        self._alphas_cumprod = self._alphas_cumprod.to(latents.device)
        noise, times = draw_noise(latents, len(self._alphas_cumprod), generator, offset=offset)
        alpha_bar = self._alphas_cumprod[times]
        told = self.conditions(batch)
        noisy = add_noise(latents, noise, alpha_bar).to(self.pipeline.unet.dtype)
        prediction = self._replayed(noisy, times, told) if self._replayed else self.model(noisy, times, **told).sample
        target = noise if self.prediction == "epsilon" else velocity(latents, noise, alpha_bar)
        return Denoising(prediction, target, alpha_bar)

    def _generator(self, device: torch.device) -> torch.Generator:
        """One for the batch at hand. The global state is the same in all processes, and so it stays."""
        seed = int(torch.randint(2**62, ()))
        return torch.Generator(device).manual_seed(seed + self.global_rank)

    def loss(self, batch: dict[str, Any], output: Denoising) -> Tensor:
        """The loss to train on, a scalar: by default the weighted mean squared error of the prediction."""
        weights = torch.ones_like(output.alpha_bar)
        if "weight" in batch:
            weights = batch["weight"].float()
        if self.min_snr_gamma is not None:
            weights = weights * min_snr_weights(output.alpha_bar, self.min_snr_gamma, self.prediction)
        return weighted_loss(output.prediction, output.target, weights)

    def on_fit_start(self) -> None:
        """Refuse CUDA graphs where there can be none.

        Raises:
            UserError: Without an NVIDIA GPU, or with several processes; and see the base class.
        """
        super().on_fit_start()
        if self.cuda_graphs and (self.device.type != "cuda" or self.trainer.world_size > 1):
            raise UserError(
                f"cuda_graphs is for a single process with a CUDA device, and this run has {self.trainer.world_size} "
                f"on {self.device.type}: leave it out"
            )

    def setup(self, stage: str) -> None:
        """Forget the graphs of a run that failed."""
        super().setup(stage)
        self._replayed = None

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Record from now on: initialisations, which put other factors in place of these, are over."""
        super().on_train_batch_start(batch, batch_idx)
        if self.cuda_graphs and self._replayed is None:
            self._replayed = ReplayedUNet(self.model)

    def on_after_backward(self) -> None:
        """Keep the gradients from the next pass."""
        super().on_after_backward()
        if self._replayed is not None:
            self._replayed.own_gradients()

    def teardown(self, stage: str) -> None:
        """Give the graphs' memory back."""
        super().teardown(stage)
        if self._replayed is not None:
            self._replayed = None
            gc.collect()  # what torch records refers to itself

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update val/loss, the loss of the training on noise that is the same each time."""
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update test/loss."""
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: dict[str, Any], batch_idx: int, stage: str) -> None:
        generator = torch.Generator().manual_seed(batch_idx * self.trainer.world_size + self.global_rank)
        metric: Any = self._losses[stage]
        for _ in range(self.evaluation_draws):
            metric.update(self.loss(batch, self(batch, generator)), weight=len(batch["prompt"]))
        self.log(f"{stage}/loss", metric, on_step=False, on_epoch=True, prog_bar=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        """Refused.

        Raises:
            UserError: Always: images are made by `sample`.
        """
        raise UserError(
            "a text-to-image model predicts no records: take pictures with the callback SampleImages while it trains, "
            "or load the exported adapter into a diffusers pipeline"
        )

    def check_prompts(self, prompts: list[str]) -> None:
        """Look at prompts before they are needed: those of the data and of samples, when a run begins.

        Raises:
            UserError: If one is longer than the text encoder takes, and such prompts are not to be cut.
        """
        if not self.truncate_prompts:
            check_lengths(self.pipeline, prompts)

    @torch.no_grad()
    def sample(
        self, prompts: list[str], seeds: list[int], *, num_inference_steps: int = 30, guidance_scale: float = 7.5
    ) -> list[Image]:
        """Pictures by the pipeline's own class, scheduler and size, with the adapter as it stands.

        No random state but the seeds' is used, and a picture is the same on every device up to rounding.

        Args:
            prompts: One for each picture.
            seeds: One for each picture.
            num_inference_steps: Steps of the sampler.
            guidance_scale: Strength of classifier-free guidance.

        Raises:
            UserError: If a prompt is longer than the text encoder takes.
        """
        self.check_prompts(prompts)
        training = self.model.training
        self.model.eval()
        try:
            return self.pipeline(
                prompts,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
            ).images
        finally:
            self.model.train(training)

    def merged(self) -> list[Any]:
        """The pipeline, with the adapter merged into its UNet. The module is used up."""
        self.pipeline.unet = merge_adapter(self.model)
        return [self.pipeline]


def _on_attention(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an adapter, with the attention's projections where no targets are named."""
    given = {name: value for name, value in fields.items() if value is not None}
    return given if "target_parameters" in given else {"target_modules": list(ATTENTION)} | given
