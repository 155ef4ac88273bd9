import json
import string
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def make_tokenizer():
    """Builds a byte-level BPE trained on a few sentences, with bos, eos and chat tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def make(bos=True, chat_template=None, trim_offsets=True):
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        special = ["<pad>", "<s>", "</s>", "<|turn|>", "<|end|>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
        core.train_from_iterator(["the cat sat on the mat", "question and answer", "user assistant system"], trainer)
        if bos:
            core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
        else:
            core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
        return PreTrainedTokenizerFast(
            tokenizer_object=core,
            pad_token="<pad>",
            bos_token="<s>" if bos else None,
            eos_token="</s>",
            extra_special_tokens=["<|turn|>", "<|end|>"],
            chat_template=chat_template,
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


class LetterTokenizer:
    """One token a character (2 + its place in string.printable): quick, and its tokens are checked by eye."""

    pad_token_id, eos_token_id, bos_token_id = 0, 1, None
    model_max_length = 10**30

    def __call__(self, text, **_):
        one = lambda part: [2 + string.printable.index(letter) for letter in part]  # noqa: E731
        return {"input_ids": one(text) if isinstance(text, str) else [one(part) for part in text]}


@pytest.fixture
def letters():
    return LetterTokenizer()


@pytest.fixture
def write(tmp_path):
    """Writes records as JSON lines (or a text as it is) and returns the path."""

    def write(name: str, contents) -> str:
        path: Path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(contents if isinstance(contents, str) else "\n".join(map(json.dumps, contents)))
        return str(path)

    return write
