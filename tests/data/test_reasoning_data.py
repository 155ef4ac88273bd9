"""ReasoningData: sources, the plain layout and chats, joined training sets, batches of questions, errors."""

import json
import lzma
import re

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from task_records import RECORDS

from lightning_rlora.data import ReasoningData
from lightning_rlora.data.tasks import TASKS
from lightning_rlora.errors import UserError

CHAT = (
    "{% for m in messages %}<|turn|>{{ m['role'] }}\n{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


@pytest.fixture
def files(write):
    """A file of each task's record, three times."""
    return {name: write(f"{name}.jsonl", [record] * 3) for name, record in RECORDS.items()}


def learned(batch, tokenizer):
    """What each row asks and what it teaches, as texts."""
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [(tokenizer.decode(ids[labels == -100]), tokenizer.decode(ids[labels != -100])) for ids, labels in rows]


def test_training_in_the_plain_layout(files, tokenizer):
    data = ReasoningData(
        train={"boolq": files["boolq"]}, tokenizer=tokenizer, max_length=512, batch_size=1, validation_fraction=0
    )
    ((prompt, reply),) = learned(next(iter(data.train_dataloader())), tokenizer)
    assert prompt == (
        "<s>Decide from the passage whether the answer to the question is true or false. Answer in the given format"
        " only.\n\nPassage: Rain is water that falls.\nQuestion: is rain wet\nAnswer format: True/False\n"
    )
    assert reply == "The correct answer is True</s>"


def test_training_with_a_chat_template(files, make_tokenizer):
    tokenizer = make_tokenizer(bos=False, chat_template=CHAT)
    data = ReasoningData(
        train={"winogrande": files["winogrande"]}, tokenizer=tokenizer, max_length=512, validation_fraction=0
    )
    prompt, reply = learned(next(iter(data.train_dataloader())), tokenizer)[0]
    assert prompt.startswith("<|turn|>system\nChoose the option")
    assert "<|end|><|turn|>user\nSentence: The cup" in prompt
    assert prompt.endswith("Answer format: Option1/Option2<|end|><|turn|>assistant\n")
    assert reply == "The correct answer is Option2<|end|>"


def test_training_sets_are_joined_and_shuffled_by_the_seed(files, tokenizer):
    def replies(seed):
        data = ReasoningData(train=files, tokenizer=tokenizer, max_length=800, validation_fraction=0, seed=seed)
        return [reply for batch in data.train_dataloader() for _, reply in learned(batch, tokenizer)]

    first = replies(0)
    expected = {TASKS[name].question(record, 1).assistant for name, record in RECORDS.items()}
    assert len(first) == 30
    assert {reply.removesuffix("</s>") for reply in first} == expected
    assert first == replies(0) != replies(1)
    assert sorted(first) == sorted(replies(1))


@pytest.mark.parametrize("chat_template", [None, CHAT])
def test_batches_of_questions(files, make_tokenizer, chat_template):
    tokenizer = make_tokenizer(bos=False, chat_template=chat_template)
    data = ReasoningData(test=files, tokenizer=tokenizer, max_length=1024, batch_size=2)
    loaders = data.test_dataloader()
    assert len(loaders) == len(RECORDS)
    for name, loader in zip(RECORDS, loaders, strict=True):
        first, last = list(loader)
        question = TASKS[name].question(RECORDS[name], 1)
        assert set(first) == {"input_ids", "attention_mask", "prompt", "task", "number", "choices", "gold"}
        assert first["task"] == [name] * 2 and first["number"] + last["number"] == [1, 2, 3]
        assert first["choices"] == [question.choices] * 2 and first["gold"] == [question.gold] * 2
        for text, ids, mask in zip(first["prompt"], first["input_ids"], first["attention_mask"], strict=True):
            assert tokenizer.decode(ids[mask.bool()]) == text
            assert text.endswith("<|turn|>assistant\n" if chat_template else f"{question.user}\n")
            assert question.system in text and question.assistant not in text


def test_questions_of_several_lengths_are_padded_on_the_left(write, tokenizer):
    source = write("a.jsonl", [RECORDS["gsm8k"] | {"question": "Why? " * n} for n in (1, 5)])
    (loader,) = ReasoningData(test={"gsm8k": source}, tokenizer=tokenizer, prompt_length=400).test_dataloader()
    (batch,) = loader
    short, long = batch["attention_mask"].tolist()
    assert all(long) and sorted(short) == short and not short[0]
    with pytest.warns(UserWarning, match="gsm8k: 1 of 2 prompts lost their beginning"):
        ReasoningData(test={"gsm8k": source}, tokenizer=tokenizer, prompt_length=len(long) - 1).test_dataloader()


def test_the_older_template_as_compressed_json_lists(tmp_path, tokenizer):
    prompt = "Is it so?\n\nAnswer format: true/false"
    records = [
        {"instruction": prompt, "input": "", "output": f"the correct answer is {a}", "answer": a}
        for a in ("true", "false")
    ]
    (tmp_path / "test.json.xz").write_bytes(lzma.compress(json.dumps(records, indent=4).encode()))
    source = str(tmp_path / "test.json.xz")
    data = ReasoningData(
        train={"boolq": source}, test={"boolq": source}, tokenizer=tokenizer, max_length=256, validation_fraction=0.5
    )
    ((batch,),) = data.test_dataloader()
    assert batch["prompt"] == [prompt + "\n"] * 2
    assert batch["gold"] == ["true", "false"] and batch["choices"] == [("true", "false")] * 2
    rows = [learned(next(iter(loader)), tokenizer) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert {reply for ((_, reply),) in rows} == {"the correct answer is true</s>", "the correct answer is false</s>"}


def test_public_sets(monkeypatch, tokenizer):
    import datasets

    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split))
        (record,) = (RECORDS[task] for task, its in TASKS.items() if (its.hub, its.config) == (name, config))
        return [record, record]

    monkeypatch.setattr(datasets, "load_dataset", load)
    tested = [name for name in TASKS if name != "metamath"]
    data = ReasoningData(train=list(TASKS), test=tested, tokenizer=tokenizer, max_length=1024, validation_fraction=0)
    data.prepare_data()
    assert len(asked) == 19
    assert ("google/boolq", None, "validation") in asked and ("google/boolq", None, "train") in asked
    assert ("allenai/ai2_arc", "ARC-Challenge", "test") in asked
    assert sum(len(batch["input_ids"]) for batch in data.train_dataloader()) == 20
    assert [len(loader.dataset) for loader in data.test_dataloader()] == [2] * 9
    asked.clear()
    own = {"winogrande": "allenai/winogrande#train", "gsm8k": None}
    ReasoningData(test=own, tokenizer=tokenizer).test_dataloader()
    assert asked == [("allenai/winogrande", "winogrande_xl", "train"), ("openai/gsm8k", "main", "test")]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(batch["input_ids"].tolist())
        return self.layer(torch.ones(1)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_resumed_run_goes_on_with_the_very_next_batch(files, tokenizer, tmp_path):
    def fit(max_steps, ckpt_path=None):
        module, flags = Module(), {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", max_steps=max_steps, enable_checkpointing=False, **flags)
        data = ReasoningData(train=files, tokenizer=tokenizer, max_length=512, batch_size=4, validation_fraction=0)
        trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        trainer.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return module.seen

    whole, part = fit(12), fit(5)
    assert whole[:5] == part
    assert fit(12, tmp_path / "5.ckpt") == whole[5:]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"train": ["bolq"]}, "unknown task 'bolq': there are boolq, piqa, siqa"),
        ({"test": {"arc": None}}, "unknown task 'arc'"),
        ({"train": ["boolq"], "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_wrong_arguments(kwargs, message):
    with pytest.raises(UserError, match=re.escape(message)):
        ReasoningData(**kwargs)


def test_wrong_data(write, tokenizer):
    def fails(message, **kwargs):
        data = ReasoningData(tokenizer=tokenizer, **kwargs)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            data.test_dataloader() if "test" in kwargs else data.train_dataloader()
        assert "\n" not in str(caught.value)

    fails("no tasks for this: give `train`")
    fails("no tasks for this: give `test`", test=[])
    fails("metamath has no public set to test on", test=["metamath"])
    fails("no such file or folder", test={"piqa": "./none.jsonl"})
    fails("piqa: there are no records", test={"piqa": write("empty.jsonl", "")})
    fails("train: the data set is empty", train={"piqa": write("none.jsonl", "")}, validation_fraction=0)
    with pytest.raises(UserError, match="a test answers the questions"):
        ReasoningData(tokenizer=tokenizer).predict_dataloader()
    mixed = write("mixed.jsonl", [RECORDS["piqa"], RECORDS["boolq"]])
    fails("piqa: record 2 has no field 'sol1': its fields are question, passage, answer", test={"piqa": mixed})
    words = write("words.jsonl", [RECORDS["metamath"] | {"response": "The answer is: x"}])
    fails("metamath: record 1: the answer is no number", test={"metamath": words})
