"""ClassificationData as it is used: GLUE's tasks, tables and JSON lines, batches, labels, resuming and errors."""

import contextlib
import gzip
import json
import logging
import lzma
import re
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_rlora.data import ClassificationData
from lightning_rlora.errors import UserError

NAMES = ["no", "yes"]
WORDS = list("abcdefghij")


@pytest.fixture(scope="session")
def pairs():
    """One token a word: [PAD] 0, [CLS] 1, [SEP] 2, [UNK] 3, a 4, b 5, ...; counts the texts of a pair."""
    tokens = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS]
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", model_input_names=inputs)


@pytest.fixture(scope="session")
def plain():
    """The same words, and nothing around them."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="j", model_input_names=inputs)


def lists(batch):
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def test_batches_of_pairs(write, pairs):
    source = write("a.csv", 'label,q,r\nyes,a b,"c, d"\nno,a,e\n')
    data = ClassificationData(test=source, text=["q", "r"], class_names=NAMES, tokenizer=pairs, max_length=8)
    (batch,) = data.test_dataloader()
    assert lists(batch) == {
        "input_ids": [[1, 4, 5, 2, 3, 7, 2], [1, 4, 2, 8, 2, 0, 0]],
        "attention_mask": [[1] * 7, [1, 1, 1, 1, 1, 0, 0]],
        "token_type_ids": [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0]],
        "labels": [1, 0],
    }
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_batches_for_a_decoder_and_texts_that_are_too_long_or_empty(write, plain, recwarn):
    records = [{"text": "a b c d", "label": 0}, {"text": "", "label": 1}, {"text": "e", "label": 1}]
    data = ClassificationData(test=write("a.jsonl", records), class_names=NAMES, tokenizer=plain, max_length=3)
    (batch,) = data.test_dataloader()
    assert lists(batch) == {  # padded with the end-of-text token
        "input_ids": [[1, 2, 3], [10, 10, 10], [5, 10, 10]],
        "attention_mask": [[1, 1, 1], [1, 0, 0], [1, 0, 0]],
        "labels": [0, 1, 1],
    }
    assert any("1 of 3 texts fill max_length = 3" in str(w.message) for w in recwarn)


def test_numbers_to_predict(write, plain):
    records = [{"text": "a", "label": 2.5}, {"text": "b", "label": "-1"}, {"text": "c", "label": 4}]
    data = ClassificationData(test=write("a.jsonl", records), class_names=[], tokenizer=plain)
    (batch,) = data.test_dataloader()
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [2.5, -1.0, 4.0]


@pytest.mark.parametrize(
    ("names", "labels", "numbers"),
    [
        (["no", "yes"], ["yes", "no", "1", 0], [1, 0, 1, 0]),
        (["0", "1", "2"], ["2", 0, 1], [2, 0, 1]),  # the module's names of `num_labels: 3`
        (["1", "2"], [1, "2"], [0, 1]),  # names before numbers
        (["False", "True"], [True, False], [1, 0]),
    ],
)
def test_labels_are_names_or_numbers(write, plain, names, labels, numbers):
    source = write("a.jsonl", [{"text": "a", "y": label} for label in labels])
    data = ClassificationData(test=source, label="y", class_names=names, tokenizer=plain)
    (batch,) = data.test_dataloader()
    assert batch["labels"].tolist() == numbers


@pytest.mark.parametrize("opener", [open, gzip.open, lzma.open])
def test_tables_as_glue_has_them(tmp_path, plain, opener):
    """No header, quotation marks as ordinary characters, carriage returns."""
    path = tmp_path / {open: "a.tsv", gzip.open: "a.tsv.gz", lzma.open: "a.tsv.xz"}[opener]
    with opener(path, "wt", encoding="utf-8", newline="") as file:
        file.write('x\t1\t\ta " b\r\nx\t0\t*\t" c d\r\n')
    columns = ["source", "label", "mark", "sentence"]
    data = ClassificationData(
        test=str(path), task="cola", columns=columns, quoting=False, class_names=NAMES, tokenizer=plain
    )
    (batch,) = data.test_dataloader()
    assert batch["input_ids"].tolist() == [[1, 0, 2], [0, 3, 4]]
    assert batch["labels"].tolist() == [1, 0]


def test_predictions_need_no_labels_and_keep_their_texts(write, pairs):
    source = write("a.jsonl", [{"q": "a", "r": "b", "other": 1}, {"q": "c d", "r": "e", "label": -1}])
    data = ClassificationData(predict=source, text=["{q} j", "r"], class_names=NAMES, tokenizer=pairs, batch_size=2)
    (batch,) = data.predict_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "records"}
    assert batch["input_ids"].tolist() == [[1, 4, 13, 2, 5, 2, 0], [1, 6, 7, 13, 2, 8, 2]]
    assert batch["records"] == [{"q": "a", "r": "b"}, {"q": "c d", "r": "e"}]


SPLITS = {
    "sst2": {"train": "train", "val": ["validation"], "predict": "test"},
    "mnli": {"train": "train", "val": ["validation_matched", "validation_mismatched"], "predict": "test_matched"},
}
COLUMNS = {"sst2": ["sentence"], "mnli": ["premise", "hypothesis"]}


@pytest.mark.parametrize("task", SPLITS)
def test_glue_comes_from_the_hub(task, monkeypatch, pairs):
    asked = []

    def load_hub(source, stage, config, streaming):
        asked.append((source.partition("#")[2], source.partition("#")[0], config))
        word = WORDS[len(set(asked))]
        return [dict.fromkeys(COLUMNS[task], word) | {"label": -1 if "test" in source else 0, "idx": 0}]

    monkeypatch.setattr("lightning_rlora.data.sources.load_hub", load_hub)
    monkeypatch.setattr("lightning_rlora.data.source_data.load_hub", load_hub)
    data = ClassificationData(task=task, class_names=["x", "y", "z"], tokenizer=pairs)
    data.prepare_data()
    splits = SPLITS[task]
    expected = {splits["train"], *splits["val"], splits["predict"]}
    assert {split for split, *_ in asked} == expected
    assert {(name, config) for _, name, config in asked} == {("nyu-mll/glue", task)}
    loaders = data.val_dataloader()
    assert (len(loaders) == 2) if task == "mnli" else (len(list(loaders)) == 1)
    (train,), (predict,) = data.train_dataloader(), data.predict_dataloader()
    assert train["input_ids"].shape[1] == (3 if task == "sst2" else 5)
    assert predict["records"][0].keys() == set(COLUMNS[task])
    with pytest.raises(UserError, match="give `test`"):  # its labels are hidden
        data.test_dataloader()


class Module(LightningModule):
    """Keeps all training batches; tells two classes."""

    def __init__(self, kill_at_step=None, **attributes):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.kill_at_step = kill_at_step
        self.class_names = NAMES
        self.seen = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def training_step(self, batch, batch_idx):
        if self.global_step == self.kill_at_step:
            raise StopAsyncIteration
        self.seen.append((batch_idx, lists(batch)))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, module, checkpoint=None, ckpt_path=None, epochs=2):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    callbacks = [checkpoint] if checkpoint else []
    options = {"callbacks": callbacks, "enable_checkpointing": bool(checkpoint), "max_epochs": epochs}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Lightning warns of loaders that cannot be resumed
        for message in (
            "does not have many workers",
            "LeafSpec",
            "is not empty",
            "dirpath has changed",
            "callbacks used",
        ):
            warnings.filterwarnings("ignore", f".*{message}")
        with contextlib.suppress(StopAsyncIteration):
            Trainer(accelerator="cpu", **quiet, **options).fit(module, data, ckpt_path=ckpt_path)
    return module.seen


@pytest.fixture
def corpus(write):
    texts = [" ".join(WORDS[(i * k) % 10] for k in range(1, 2 + i % 4)) for i in range(31)]
    return write("corpus.jsonl", [{"text": text, "label": NAMES[i % 2]} for i, text in enumerate(texts)])


@pytest.mark.parametrize("kill", [2, 8, 11, 15])
def test_resume(corpus, plain, tmp_path, kill):
    make = lambda: ClassificationData(corpus, validation=corpus, tokenizer=plain, batch_size=4)  # noqa: E731
    whole = fit(make(), Module())
    first, second = whole[:8], whole[8:]
    assert first != second
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="last", save_top_k=1)
    assert fit(make(), Module(kill), checkpoint) == whole[:kill]
    assert fit(make(), Module(), ckpt_path=str(tmp_path / "last.ckpt")) == whole[kill:]


def test_changed_labels_are_told_on_a_resume(corpus, write, plain, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=1, filename="last", save_top_k=1)
    fit(ClassificationData(corpus, tokenizer=plain, batch_size=4), Module(3), checkpoint)
    records = [json.loads(line) for line in Path(corpus).read_text().splitlines()]
    records[3]["label"] = "yes" if records[3]["label"] == "no" else "no"
    other = ClassificationData(write("other.jsonl", records), tokenizer=plain, batch_size=4)
    with pytest.raises(UserWarning, match=r"other training data than the checkpoint's \(data changed\)"):
        fit(other, Module(), ckpt_path=str(tmp_path / "last.ckpt"))


def test_a_part_is_held_out(corpus, plain):
    data = ClassificationData(corpus, tokenizer=plain, class_names=NAMES, validation_fraction=0.2)
    assert len(data.val_dataloader().dataset) == 6
    assert len(data.train_dataloader().dataset) == 25


def test_a_class_that_never_occurs_is_told(corpus, plain, recwarn):
    list(ClassificationData(corpus, tokenizer=plain, class_names=[*NAMES, "maybe"]).train_dataloader())
    assert any("train: no text has the label maybe" in str(w.message) for w in recwarn)


def test_the_model_and_the_data_must_agree(corpus, plain):
    with pytest.raises(UserError, match="the data's task is sst2 and the model's cola"):
        fit(ClassificationData(corpus, task="sst2", text="text", tokenizer=plain), Module(task="cola"))
    with pytest.raises(UserError, match="leave the data's out"):
        fit(ClassificationData(corpus, class_names=["a", "b"], tokenizer=plain), Module())


WRONG = {
    "no text column": ([{"body": "a", "label": 0}], {}, "record 1 has no field 'text': its fields are body, label"),
    "no label column": ([{"text": "a"}], {}, "record 1 has no field 'label': its fields are text"),
    "a text that is none": ([{"text": 3, "label": 0}], {}, "the field 'text' is a int, not a string"),
    "unknown name": ([{"text": "a", "label": "maybe"}], {}, "'maybe' is none of the model's 2 classes (no, yes)"),
    "too many classes": ([{"text": "a", "label": 2}], {}, "the label 2 is none of the model's 2 classes"),
    "hidden label": ([{"text": "a", "label": -1}], {}, "the label -1 is none"),
    "no number": ([{"text": "a", "label": "b"}], {"class_names": []}, "'b' is no number"),
    "not finite": ([{"text": "a", "label": "nan"}], {"class_names": []}, "'nan' is no number"),
    "empty": ([], {}, "train: the data set is empty"),
    "no classes": ([{"text": "a", "label": 0}], {"class_names": None}, "does not tell its classes"),
    "three texts": ([], {"text": ["a", "b", "c"]}, "give one column, two of a pair"),
    "no such task": ([], {"task": "sst3"}, "unknown task 'sst3'"),
    "no length": ([], {"max_length": 0}, "max_length is 0"),
    "no rows": ([], {"batch_size": 0}, "batch_size is 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_told_in_one_line(case, write, plain):
    records, options, message = WRONG[case]
    options = {"class_names": NAMES, "tokenizer": plain, "validation_fraction": 0} | options
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        ClassificationData(write("a.jsonl", records), **options).train_dataloader()
    assert "\n" not in str(caught.value)


def test_a_table_with_other_columns_than_named(write, plain):
    source = write("a.tsv", "1\ta b\n0\tc\td\n")
    data = ClassificationData(test=source, columns=["label", "text"], class_names=NAMES, tokenizer=plain)
    with pytest.raises(UserError, match="line 2: not 2 columns as there are names for"):
        data.test_dataloader()
