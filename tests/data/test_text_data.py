"""TextData as it is used: arguments, splits, batches, warnings and errors."""

import re
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_rlora.data import TextData
from lightning_rlora.data.python_topics import python_topics
from lightning_rlora.errors import UserError


def quiet(**kwargs):
    flags = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", enable_model_summary=False, **flags, **kwargs)


def words(count):
    return [{"text": f"{i:04d}", "q": f"{i:04d}", "a": str(i % 10)} for i in range(count)]


@pytest.mark.parametrize("packing", [True, False])
def test_batches(write, letters, packing):
    source = write("a.jsonl", words(50))
    data = TextData(source, tokenizer=letters, max_length=16, batch_size=4, packing=packing, validation_fraction=0.1)
    train, validation = list(data.train_dataloader()), list(data.val_dataloader())
    keys = {"input_ids", "labels", "position_ids" if packing else "attention_mask"}
    for batch in train + validation:
        assert set(batch) == keys
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())
        assert batch["input_ids"].shape[1] == (16 if packing else 5)
    assert len(train) == len(data.train_dataloader()) == (4 if packing else 12)  # 45 documents of 5 tokens
    eos = [
        sum((batch["input_ids"] == letters.eos_token_id).sum().item() for batch in part) for part in (train, validation)
    ]
    assert eos == [45, 5]


def test_held_out_documents_are_not_trained_on(write, letters):
    data = TextData(write("a.jsonl", words(50)), tokenizer=letters, max_length=5, validation_fraction=0.2)
    rows = [
        {tuple(row) for batch in loader for row in batch["input_ids"].tolist()}
        for loader in (data.val_dataloader(), data.train_dataloader())
    ]
    assert [len(part) for part in rows] == [10, 40] and not rows[0] & rows[1]


def test_embedded_topics_with_a_real_tokenizer(tokenizer):
    data = TextData("embedded:python-topics", tokenizer=tokenizer, max_length=256)
    train, validation = len(data.train_dataloader()), len(data.val_dataloader())
    assert 0.02 < validation / train < 0.5
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (8, 256)
    border = batch["position_ids"][0].tolist().index(0, 1) if 0 in batch["position_ids"][0, 1:] else 256
    text = tokenizer.decode(batch["input_ids"][0, :border], skip_special_tokens=True)
    assert any(text in record["text"] for record in python_topics("train"))


def test_prompts_of_predict(write, letters, recwarn):
    source = write("a.jsonl", [{"q": "12"}, {"q": "12345"}])
    data = TextData(predict=source, prompt="{q}a", answer="a", tokenizer=letters, max_length=8, batch_size=2)
    (batch,) = data.predict_dataloader()
    assert batch["prompt"] == ["12a", "12345a"]
    assert batch["input_ids"].tolist() == [[0, 3, 4, 12], [5, 6, 7, 12]]  # half of 8 tokens, the end of the prompt
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1]]
    assert any("1 of 2 prompts lost their beginning" in str(w.message) for w in recwarn)


class Module(LightningModule):
    def __init__(self, tokenizer=None):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.late_tokenizer = tokenizer
        self.seen = {"train": 0, "validation": 0, "test": 0, "predict": []}

    def setup(self, stage):
        self.tokenizer = self.late_tokenizer

    def training_step(self, batch, _):
        self.seen["train"] += 1
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, _):
        self.seen["validation"] += 1

    def test_step(self, batch, _):
        self.seen["test"] += 1

    def predict_step(self, batch, _):
        self.seen["predict"] += batch["prompt"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_every_stage_with_the_models_tokenizer(write, letters):
    source = write("a.jsonl", words(12))
    data = TextData(source, test=source, predict=source, max_length=10, batch_size=2, prompt_length=5)
    module = Module(letters)
    quiet(max_epochs=2, num_sanity_val_steps=0).fit(module, data)
    assert (module.seen["train"], module.seen["validation"]) == (6, 2)  # 11 documents, two a row, two rows a batch
    quiet().validate(module, data)
    quiet().test(module, data)
    quiet().predict(module, data)
    assert (module.seen["validation"], module.seen["test"]) == (3, 3)
    assert module.seen["predict"] == [f"{i:04d}" for i in range(12)]


def test_prompts_leave_room_for_the_answer(write, letters):
    module = Module(letters)
    module.max_new_tokens = 3
    for length, longest in ((8, 5), (3, None)):
        data = TextData(predict=write("a.jsonl", [{"text": "0123456789"}]), max_length=length)
        data.trainer = quiet()
        data.trainer.strategy.connect(module)
        module.tokenizer = letters
        if longest:
            (batch,) = data.predict_dataloader()
            assert batch["input_ids"].shape == (1, longest)
        else:
            with pytest.raises(UserError, match="max_length is 3: that leaves no prompt beside 3 new tokens"):
                data.predict_dataloader()


def test_overfit_batches_are_the_same_every_epoch(write, letters):
    data = TextData(write("a.jsonl", words(40)), tokenizer=letters, max_length=5, batch_size=2, validation_fraction=0)
    seen = []
    module = Module(letters)
    module.training_step = lambda batch, batch_idx: (
        seen.append(batch["input_ids"].tolist()) or module.layer(torch.ones(1)).sum()
    )
    quiet(max_epochs=2, overfit_batches=3).fit(module, data)
    assert len(seen) == 6 and seen[:3] == seen[3:]


def test_no_validation(write, letters):
    source = write("a.jsonl", words(4))
    for kwargs in ({"validation_fraction": 0}, {"streaming": True}):
        data = TextData(source, tokenizer=letters, max_length=8, **kwargs)
        with pytest.raises(UserError, match="nothing to validate on"):
            data.val_dataloader()
        module = Module()
        quiet(max_epochs=1).fit(module, data)
        assert module.seen["train"] and not module.seen["validation"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"text": "text", "prompt": "q", "answer": "a"}, "text and prompt/answer exclude each other"),
        ({"messages": "m", "answer": "a"}, "exclude each other"),
        ({"prompt": "q"}, "`prompt` and `answer` belong together"),
        ({"max_length": 1}, "max_length is 1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"prompt_length": 0}, "prompt_length is 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TextData("a.jsonl", **kwargs)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("contents", "kwargs", "message"),
    [
        ("", {}, "train: the data set is empty"),
        ([{"text": "  "}], {"validation_fraction": 0}, "train: the data set is empty"),
        ([{"t": "1"}], {"validation_fraction": 0}, "record 1 has no field 'text': its fields are t"),
        ([{"text": 5}], {"validation_fraction": 0}, "the field 'text' is a int, not a string"),
        (words(4), {"prompt": "{question}?", "answer": "a"}, "has no field 'question': its fields are text, q, a"),
        (
            words(4),
            {"prompt": "q", "answer": "a", "max_length": 4},
            "anything to learn lies within the first max_length = 4",
        ),
        ([{"text": "1"}], {"tokenizer": None}, "the model brings no tokenizer"),
    ],
)
def test_wrong_data(write, letters, contents, kwargs, message, streaming):
    data = TextData(write("a.jsonl", contents), **{"tokenizer": letters, "streaming": streaming, **kwargs})
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        data.train_dataloader()
    assert "\n" not in str(caught.value)


def test_one_document_cannot_be_split(write, letters):
    with pytest.raises(UserError, match="only 1 record"):
        TextData(write("a.txt", "123"), tokenizer=letters).train_dataloader()


def test_missing_sources_and_tokenizers(letters):
    with pytest.raises(UserError, match="give `test`"):
        TextData(tokenizer=letters).test_dataloader()
    with pytest.raises(UserError, match=re.escape("no such file or folder: './none.jsonl'")):
        TextData("./none.jsonl").prepare_data()
    with pytest.raises(UserError, match=r"no tokenizer '\./none'"):
        TextData("embedded:python-topics", tokenizer="./none").train_dataloader()


def test_length_limits(write, letters, make_tokenizer):
    source = write("a.jsonl", words(4))
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 64
    with pytest.raises(UserError, match="max_length is 65, but the tokenizer takes at most 64 tokens"):
        TextData(source, tokenizer=tokenizer, max_length=65).train_dataloader()
    module = Module(letters)
    module.model = torch.nn.Module()
    module.model.config = type("Config", (), {"max_position_embeddings": 32})
    with pytest.raises(UserError, match="max_length is 33, but the model takes at most 32 tokens"):
        quiet(max_epochs=1).fit(module, TextData(source, max_length=33))


def test_cut_and_dropped_examples_are_counted(write, letters):
    records = [{"q": "0" * n, "a": "1"} for n in range(1, 9)]
    data = TextData(
        write("a.jsonl", records), prompt="q", answer="a", tokenizer=letters, max_length=6, validation_fraction=0
    )
    # 1 + 4 tokens and eos fit, 5 lose the eos, 6 to 8 the whole answer
    with pytest.warns(UserWarning, match="train: 4 of 8 examples were cut to max_length = 6 tokens; 3 were left out"):
        data.train_dataloader()
    data.streaming = True
    with pytest.warns(UserWarning, match="examples longer than max_length = 6 tokens lose their end"):
        list(data.train_dataloader())


def test_named_tokenizer(write, make_tokenizer, tmp_path, monkeypatch):
    make_tokenizer().save_pretrained(tmp_path / "saved")
    import lightning_rlora.assets

    monkeypatch.setattr(lightning_rlora.assets, "resolve", lambda name: str(tmp_path / name), raising=False)
    data = TextData(write("a.jsonl", words(4)), tokenizer="saved", max_length=16)
    assert next(iter(data.train_dataloader()))["input_ids"].shape[1] == 16


def test_import_stays_light():
    code = "import sys, lightning_rlora.data; print([m for m in ('datasets', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_a_stream_of_a_hub_data_set(monkeypatch, letters):
    import datasets

    def load(*_, streaming, **__):
        assert streaming
        return datasets.IterableDataset.from_generator(
            lambda shards: ({"text": f"{shard}{i:02d}"} for shard in shards for i in range(9)),
            gen_kwargs={"shards": [1, 2, 3]},
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    batches = []
    for num_workers in (0, 2):
        data = TextData("user/name", tokenizer=letters, max_length=16, streaming=True, num_workers=num_workers)
        batches.append([batch["input_ids"].tolist() for batch in data.train_dataloader()])
    assert batches[0] == batches[1]
    assert sum(row.count(letters.eos_token_id) for batch in batches[0] for row in batch) == 27


def test_the_command_line_reads_the_signature(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(TextData, "data")
    config = tmp_path / "config.yaml"
    config.write_text(
        """
        data:
          class_path: lightning_rlora.data.TextData
          init_args:
            train: [a.jsonl, "b/*.csv"]
            validation: openai/gsm8k#test
            hub_config: main
            prompt: "Question: {question}\\nAnswer:"
            answer: " {answer}"
            tokenizer: embedded:tiny-lm
            max_length: 64
        """
    )
    data = parser.instantiate(parser.parse_path(str(config))).data
    assert data.sources == {
        "train": ["a.jsonl", "b/*.csv"],
        "validation": "openai/gsm8k#test",
        "test": None,
        "predict": None,
    }
    assert (data.prompt, data.tokenizer) == ("Question: {question}\nAnswer:", "embedded:tiny-lm")
    described = ArgumentParser()
    described.add_class_arguments(TextData, "data")
    text = " ".join(described.format_help().split())
    assert "Longest row in tokens" in text and "--data.hub_config" in text
