"""The parts of the embedded text-to-image model, in Stable Diffusion's architecture at a thousandth of its size."""

import copy
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

VOCABULARY = 2048
PROMPT_LENGTH = 48  # tokens; a caption takes about 12, one of DreamBooth's prompts about 20
LATENT_CHANNELS = 6  # of 48 numbers in 4 x 4 pixels: with 4 instead, outlines blur
DROPOUT = 0.1  # of the UNet while it is trained from scratch; what is saved has none
BEGIN, END = "<|startoftext|>", "<|endoftext|>"


class Sizes(NamedTuple):
    """Channels at each resolution of the two convolutional networks; width and depth of the text encoder."""

    vae: tuple[int, int, int] = (32, 64, 96)  # 64, 32, 16 pixels
    unet: tuple[int, int, int] = (96, 128, 160)  # 16, 8, 4 pixels of the latents
    text: int = 128
    text_layers: int = 3


TINY = Sizes(vae=(16, 16, 16), unet=(32, 32, 32), text=32, text_layers=1)


def train_tokenizer(texts: list[str]) -> CLIPTokenizer:
    """Byte-level BPE as CLIP has it: lower case, words end in `</w>`, and no text is unknown."""
    clip = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    alphabet = [*letters, *(letter + "</w>" for letter in letters)]  # training keeps only the word ends it has seen
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = merges[: VOCABULARY - len(alphabet) - 2]
    words = [*alphabet, *("".join(pair) for pair in merges), BEGIN, END]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=PROMPT_LENGTH)


def encode_prompts(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids (len(prompts), PROMPT_LENGTH), as Stable Diffusion's pipeline makes them."""
    return tokenizer(
        prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def build_vae(sizes: Sizes, pixels: int) -> AutoencoderKL:
    """64 x 64 x 3 to 16 x 16 x 6 and back; no attention, so that it works at every size alike."""
    vae = AutoencoderKL(
        block_out_channels=sizes.vae,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=pixels,
        scaling_factor=1.0,  # measured after training
        force_upcast=False,
    )
    # The posterior's deviation starts at 0.14: at 1, where it would start, it drowns what the encoder has yet to learn.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -4.0)
    return vae


def build_text_encoder(sizes: Sizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text,
            intermediate_size=4 * sizes.text,
            projection_dim=sizes.text,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text // 32,
            max_position_embeddings=PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(sizes: Sizes, latent_pixels: int) -> UNet2DConditionModel:
    """Attention at 8 x 8 and 4 x 4 only: at 16 x 16 it would cost a CPU as much as all the rest."""
    return UNet2DConditionModel(
        sample_size=latent_pixels,
        dropout=DROPOUT,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=sizes.unet,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=sizes.text,
        attention_head_dim=tuple(width // 32 for width in sizes.unet),  # the numbers of heads, in spite of its name
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction, which keeps white backgrounds white.

    "trailing" timesteps: sampling begins at the noisiest step, however few steps are taken.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def save_pipeline(output: Path, vae, text_encoder, tokenizer, unet, scheduler) -> None:
    """Write a StableDiffusionPipeline of copies in bfloat16; what stood there before stands until this is whole."""
    vae, text_encoder, unet = (copy.deepcopy(part).to("cpu", torch.bfloat16) for part in (vae, text_encoder, unet))
    unet.register_to_config(dropout=0.0)
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial)
    # Told no dtype, diffusers takes float32 and transformers what a part's configuration says: they have to agree.
    rewrite(partial / "text_encoder" / "config.json", {"dtype": "float32"})
    rewrite(partial / "tokenizer" / "tokenizer.json", {})
    tokenizer.backend_tokenizer.model.save(str(partial / "tokenizer"))  # vocab.json and merges.txt, CLIP's own format
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)


def rewrite(path: Path, changes: dict) -> None:
    """Change top entries of a JSON file and leave out its idle white space."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
