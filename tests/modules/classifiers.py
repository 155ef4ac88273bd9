"""Tiny encoders and decoders without a classification head, with their tokenizers, as folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lightning_rlora.assets import resolve
from lightning_rlora.modules.checkpoint import save_pretrained

WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "off", "mat", "good", "bad", "and", "was", "it"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LARGE = {"initializer_range": 0.2}  # so that no two texts look alike


def word_tokenizer(special: dict[str, str], pair: str, single: str, **options) -> PreTrainedTokenizerFast:
    """A token for each word, and the templates of an encoder for single texts and pairs."""
    tokens = [*special.values(), *WORDS]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = [(token, i) for i, token in enumerate(tokens) if token in single.split() + pair.replace(":1", "").split()]
    core.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **special, **options)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Counts the texts of a pair in token types, and knows no end-of-text token."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return word_tokenizer(special, "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS] $A [SEP]", model_input_names=inputs)


def roberta_tokenizer() -> PreTrainedTokenizerFast:
    """Padding is token 1, as in every RoBERTa."""
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return word_tokenizer(special, "<s> $A </s> </s> $B </s>", "<s> $A </s>")


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's way: nothing is put around a text, and there is no token to pad with."""
    whole = AutoTokenizer.from_pretrained(resolve("embedded:tiny-lm"))
    return PreTrainedTokenizerFast(tokenizer_object=whole.backend_tokenizer, eos_token="<eos>", model_max_length=64)


def build(kind: str):
    torch.manual_seed(0)
    if kind == "bert":
        return BertForPreTraining(BertConfig(vocab_size=32, max_position_embeddings=64, **SIZES, **LARGE))
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(vocab_size=32, max_position_embeddings=66, **SIZES, **LARGE))
    if kind == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
        return DistilBertForMaskedLM(DistilBertConfig(vocab_size=32, **sizes, **LARGE))
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=4096, **sizes, **LARGE))


TOKENIZERS = {
    "bert": bert_tokenizer,
    "roberta": roberta_tokenizer,
    "distilbert": bert_tokenizer,
    "gpt2": decoder_tokenizer,
}


def save(kind: str, folder: Path) -> str:
    """Save a tiny model of a kind into a folder; returns its path."""
    save_pretrained(folder, build(kind), TOKENIZERS[kind]())
    return str(folder)
