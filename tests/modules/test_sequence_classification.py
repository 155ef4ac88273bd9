"""The classifier: its head, its metrics, and what becomes of a run with it."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from classifiers import TOKENIZERS, save
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora import (
    CausalLM,
    ClassificationData,
    Riemannion,
    SequenceClassification,
    UserError,
    find_pairs,
)
from lightning_rlora.adapters import export_adapter
from lightning_rlora.cli import main
from lightning_rlora.data.classification import GLUE_TEXTS
from lightning_rlora.modules.checkpoint import load_module
from lightning_rlora.modules.glue import GLUE
from lightning_rlora.optim import LinearWithWarmup

ADAPTER = {"r": 4, "lora_alpha": 8}
TEXTS = ["the cat sat", "the dog ran off the mat and it was good", "bad"]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of tiny models by kind, and the embedded one."""
    home = tmp_path_factory.mktemp("bases")
    return {kind: save(kind, home / kind) for kind in TOKENIZERS} | {"llama": "embedded:tiny-lm"}


@pytest.fixture
def table(tmp_path):
    """60 texts that say good or bad, with the labels yes and no."""
    lines = [f"the {'cat' if i % 3 else 'dog'} was {'good' if i % 2 else 'bad'}\t{'ny'[i % 2]}" for i in range(60)]
    path = tmp_path / "table.tsv"
    path.write_text(
        "text\tlabel\n" + "".join(f"{line}\n" for line in lines).replace("\tn", "\tno").replace("\ty", "\tyes")
    )
    return str(path)


def batch_of(tokenizer, texts, **rest):
    tokenizer.padding_side = "right"
    return dict(tokenizer(texts, return_tensors="pt", padding=True)) | rest


def evaluate(module, *sets, stage="validate"):
    """The metrics of ready-made batches with logits, as a trainer logs them."""
    module.forward = lambda batch: SimpleNamespace(logits=batch["logits"])
    trainer = Trainer(**QUIET)
    getattr(trainer, stage)(module, [DataLoader(batches, batch_size=None) for batches in sets], verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


def scored(labels, classes, seed, size=7):
    """Batches of random logits that lean to the labels."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(labels), classes, generator=generator) + torch.eye(classes)[labels]
    parts = zip(logits.split(size), labels.split(size), strict=True)
    return logits.double().numpy(), [{"logits": x, "labels": y} for x, y in parts]


def expected_scores(logits, labels):
    """Accuracy, F1 of class 1, macro F1 and Matthews of two or more classes, and the loss, from their definitions."""
    found, n = logits.argmax(1), len(labels)
    table = Counter(zip(labels.tolist(), found.tolist(), strict=True))
    classes = range(logits.shape[1])
    count = lambda true, guess: sum(v for (t, g), v in table.items() if true in (t, None) and guess in (g, None))  # noqa: E731
    f1 = [2 * table[c, c] / (count(c, None) + count(None, c)) for c in classes]
    hits = sum(table[c, c] for c in classes)
    both = sum(count(c, None) * count(None, c) for c in classes)
    spread = [n**2 - sum(count(*((c, None) if own else (None, c))) ** 2 for c in classes) for own in (True, False)]
    loss = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(logits, labels, strict=True)])
    return {
        "accuracy": hits / n,
        "f1": f1[1],
        "f1_macro": np.mean(f1),
        "matthews": (hits * n - both) / np.sqrt(spread[0] * spread[1]),
        "loss": loss,
    }


def ranks(x):
    """Ranks from 1; equal values share the mean of theirs."""
    return np.array([(x < value).sum() + (1 + (x == value).sum()) / 2 for value in x])


@pytest.mark.parametrize("task", [*GLUE, "three classes", "a number"])
def test_metrics_are_those_of_the_task(task, bases):
    told = {"three classes": {"num_labels": 3}, "a number": {"num_labels": 1}}.get(task, {"task": task})
    module = SequenceClassification(bases["gpt2"], adapter=ADAPTER, **told)
    generator = torch.Generator().manual_seed(1)
    if task in ("stsb", "a number"):
        labels = (torch.rand(40, generator=generator) * 10).round() / 2  # in half steps, so with ties
        guesses = labels + 1.5 * torch.randn(40, generator=generator)
        batches = [{"logits": x[:, None], "labels": y} for x, y in zip(guesses.split(7), labels.split(7), strict=True)]
        found = evaluate(module, batches)
        x, y = guesses.double().numpy(), labels.double().numpy()
        expected = {
            "loss": np.mean((x - y) ** 2),
            "pearson": np.corrcoef(x, y)[0, 1],
            "spearman": np.corrcoef(ranks(x), ranks(y))[0, 1],
        }
    else:
        classes = 3 if task in ("mnli", "three classes") else 2
        labels = torch.randint(classes, (40,), generator=generator)
        logits, batches = scored(labels, classes, seed=2)
        names = {"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}.get(task, ["accuracy"])
        names = ["accuracy", "f1_macro"] if task == "three classes" else names
        every = expected_scores(logits, labels.numpy())
        expected = {name: every[name] for name in ["loss", *names]}
        found = evaluate(module, batches)
    assert found.keys() == {f"val/{name}" for name in expected}
    for name, value in expected.items():
        assert abs(found[f"val/{name}"] - value) < 1e-6, name  # float32; measured 2e-7


def test_the_two_sets_of_mnli_are_scored_apart(bases):
    module = SequenceClassification(bases["gpt2"], task="mnli", adapter=ADAPTER)
    labels = torch.arange(30) % 3
    sets = [scored(labels, 3, seed) for seed in (3, 4)]
    found = evaluate(module, *(batches for _, batches in sets))
    for suffix, (logits, _) in zip(("", "_mismatched"), sets, strict=True):
        expected = expected_scores(logits, labels.numpy())
        for name in ("loss", "accuracy"):
            assert abs(found[f"val/{name}{suffix}"] - expected[name]) < 1e-6, name
    two = [{"logits": torch.zeros(2, 2), "labels": torch.tensor([0, 1])}]
    with pytest.raises(UserError, match="2 data sets"):
        evaluate(SequenceClassification(bases["gpt2"], task="rte", adapter=ADAPTER), two, two)


def test_modules_and_data_know_the_same_tasks():
    assert GLUE.keys() == GLUE_TEXTS.keys()


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama"])
def test_padding_changes_no_logits(kind, bases):
    module = SequenceClassification(bases[kind], num_labels=3, adapter=ADAPTER).eval()
    with torch.no_grad():
        together = module(batch_of(module.tokenizer, TEXTS)).logits
        alone = torch.cat([module(batch_of(module.tokenizer, [text])).logits for text in TEXTS])
    assert (together[0] - together[1]).abs().max() > 1e-3 * together.abs().max()
    # measured 6e-7 relatively
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * together.abs().max().item())


def test_an_encoder_is_told_which_text_a_token_belongs_to(bases):
    module = SequenceClassification(bases["bert"], num_labels=2, adapter=ADAPTER).eval()
    batch = dict(module.tokenizer(["the cat sat"], ["it ran"], return_tensors="pt"))
    with torch.no_grad():
        pair, single = module(batch).logits, module(batch | {"token_type_ids": batch["token_type_ids"] * 0}).logits
        assert not torch.allclose(pair, single, atol=1e-3)
        other = SequenceClassification(bases["roberta"], num_labels=2, adapter=ADAPTER).eval()
        other(batch)  # RoBERTa has one type only: token types are not passed on


@pytest.mark.parametrize(
    ("kind", "pairs", "trained"),
    [
        ("bert", 13, {"classifier"}),  # six layers a block, and the pooler that it was pretrained with
        ("roberta", 12, {"classifier"}),
        ("distilbert", 12, {"classifier", "pre_classifier"}),  # the base lacks both
        ("gpt2", 8, {"score"}),
        ("llama", 42, {"score"}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_linear_layer_but_the_head_is_adapted(kind, pairs, trained, dtype, bases):
    module = SequenceClassification(bases[kind], num_labels=3, adapter=ADAPTER, dtype=dtype)
    assert len(find_pairs(module)) == pairs
    others = {name: p for name, p in module.model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name.split(".")[2] for name in others} == trained
    assert all(".modules_to_save." in name and p.dtype == torch.float32 for name, p in others.items())
    output = module(batch_of(module.tokenizer, TEXTS))
    assert output.logits.shape == (3, 3)
    assert output.logits.dtype == torch.float32
    module.loss({"labels": torch.tensor([0, 1, 2])}, output).backward()
    assert all(p.grad is not None for p in others.values())


def test_the_head_starts_from_the_seed(bases):
    def head(seed):
        torch.manual_seed(seed)
        module = SequenceClassification(bases["roberta"], num_labels=2, adapter=ADAPTER)
        return torch.cat(
            [p.flatten() for n, p in module.named_parameters() if "modules_to_save" in n and p.requires_grad]
        )

    first, again, other = head(5), head(5), head(6)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Stop(Callback):
    """Breaks a run off at the start of a batch, by its number in the whole run."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            raise StopAsyncIteration


def fit(base, table, folder, callbacks=(), ckpt_path=None, seed=0):
    torch.manual_seed(seed)
    module = SequenceClassification(
        base,
        class_names=["no", "yes"],
        adapter=ADAPTER | {"lora_dropout": 0.2},
        optimizer=lambda groups: Riemannion(groups, lr=0.02, adamw_lr=1e-2),
        lr_scheduler=lambda optimizer: LinearWithWarmup(optimizer),
    )
    save = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=1, filename="last")
    data = ClassificationData(table, batch_size=4, max_length=16)
    trainer = Trainer(**QUIET, max_epochs=2, callbacks=[save, *callbacks], num_sanity_val_steps=0)
    try:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    except StopAsyncIteration:
        return None
    contents = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    return module, contents["state_dict"], contents["optimizer_states"][0]["state"], dict(trainer.callback_metrics)


def same(x, y):
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[key], y[key]) for key in x)
    return torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("batch", [8, 21])  # of 15 an epoch
def test_a_resumed_run_ends_with_the_same_bits(batch, bases, table, tmp_path):
    _, weights, state, metrics = fit(bases["roberta"], table, tmp_path / "whole")
    assert any("classifier.modules_to_save" in name for name in weights)
    assert not any("original_module" in name or name.endswith("base_layer.weight") for name in weights)
    assert fit(bases["roberta"], table, tmp_path / "cut", [Stop(batch)]) is None
    checkpoint = str(tmp_path / "cut" / "last.ckpt")
    # another seed: the head that was drawn at random must come from the checkpoint
    _, *rest = fit(bases["roberta"], table, tmp_path / "rest", ckpt_path=checkpoint, seed=1)
    assert all(same(x, y) for x, y in zip((weights, state, metrics), rest, strict=True))


def stock_logits(base, adapter, batch, classes, **options):
    """What PEFT and transformers alone make of an exported adapter."""
    torch.manual_seed(77)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes, **options)
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter).eval()(**batch).logits


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "gpt2"])
def test_stock_peft_loads_the_exported_adapter(kind, bases, tmp_path):
    module = SequenceClassification(bases[kind], num_labels=3, adapter=ADAPTER).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    export_adapter(module.model, tmp_path / "adapter")
    batch = batch_of(module.tokenizer, TEXTS)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        trained = module(batch).logits
    options = {"pad_token_id": module.tokenizer.pad_token_id}
    assert torch.equal(stock_logits(bases[kind], tmp_path / "adapter", batch, 3, **options), trained)
    further = SequenceClassification(bases[kind], num_labels=3, adapter_path=str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        assert torch.equal(further(batch).logits, trained)


CONFIG = """
seed_everything: 0
trainer:
  accelerator: cpu
  max_steps: 24
  max_epochs: -1
  val_check_interval: 12
  check_val_every_n_epoch: null
  log_every_n_steps: 3
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: run
  callbacks:
    - class_path: LocallyOptimalInit
      init_args: {alpha: 0.05, batches: 2, oversampling: 4, offset: subtract}
    - class_path: Retraction
spectrum:
  every_n_steps: 4
model:
  class_path: SequenceClassification
  init_args:
    base: BASE
    class_names: ["no", "yes"]
    adapter: {r: 4, lora_alpha: 8}
    optimizer:
      class_path: Riemannion
      init_args: {lr: 0.1, adamw_lr: 1.0e-2}
    lr_scheduler:
      class_path: LinearWithWarmup
data:
  class_path: ClassificationData
  init_args: {train: TABLE, test: TABLE, predict: TABLE, max_length: 16, batch_size: 10}
"""


def test_a_run_from_a_configuration(bases, table, tmp_path, monkeypatch, capsys):
    """Locally optimal initialisation, Riemannion, retraction and spectra on RoBERTa, and what is done with the run."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG.replace("BASE", bases["roberta"]).replace("TABLE", table))
    main(["fit", "--config", "config.yaml"])
    header, *rows = Path("run/metrics.csv").read_text().splitlines()
    assert header == "step,train/loss,val/loss,val/accuracy,val/f1_macro"
    assert float(rows[-1].split(",")[3]) == 1.0  # good and bad are told apart
    assert Path("run/spectrum.csv").read_text().count("\n") > 3
    checkpoint = ["--ckpt_path", "run/checkpoints/last.ckpt"]
    main(["test", "--config", "run/config.yaml", *checkpoint])
    main(["predict", "--config", "run/config.yaml", *checkpoint])
    assert "test/f1_macro" in capsys.readouterr().out
    predictions = [json.loads(line) for line in Path("run/predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 60
    for record in predictions:
        assert record["label"] == ("yes" if "good" in record["text"] else "no")
        assert 0.5 < record["probability"] <= 1

    main(["export", "--ckpt_path", "run", "--output", "exported"])
    main(["merge", "--ckpt_path", "run", "--output", "merged"])
    module = load_module("run/checkpoints/last.ckpt")
    batch = batch_of(module.tokenizer, TEXTS)
    batch.pop("token_type_ids", None)
    merged = AutoModelForSequenceClassification.from_pretrained("merged").eval()
    assert merged.config.id2label == {0: "no", 1: "yes"}
    with torch.no_grad():
        trained, of_merged = module(batch).logits, merged(**batch).logits
    assert json.loads(Path("exported/adapter_config.json").read_text())["r"] == 8  # exact: the offset doubles the rank
    # logits of size 3; measured 2e-6
    for found in (of_merged, *(stock_logits(bases["roberta"], path, batch, 2) for path in ("exported", "run/adapter"))):
        torch.testing.assert_close(found, trained, rtol=0, atol=2e-5)


def test_mnli_from_the_hub_by_the_command_line(bases, tmp_path, monkeypatch):
    """Both validation sets stand in the record of the run, the sanity validation included."""

    def load_hub(source, stage, config, streaming):
        size = {"train": 48, "validation_matched": 9, "validation_mismatched": 6}[source.partition("#")[2]]
        texts = {"premise": "the cat sat", "hypothesis": "it ran"}
        return [texts | {"label": number % 3, "idx": number} for number in range(size)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_rlora.data.sources.load_hub", load_hub)
    monkeypatch.setattr("lightning_rlora.data.source_data.load_hub", lambda *args, **kwargs: None)
    arguments = ["--model", "SequenceClassification", "--model.base", bases["roberta"], "--model.task", "mnli"]
    arguments += [
        "--data",
        "ClassificationData",
        "--data.task",
        "mnli",
        "--data.batch_size",
        "4",
        "--data.max_length",
        "16",
    ]
    arguments += ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.default_root_dir", "run"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    main(["fit", *arguments])
    header, *rows = Path("run/metrics.csv").read_text().splitlines()
    names = ["val/loss", "val/accuracy", "val/loss_mismatched", "val/accuracy_mismatched"]
    assert header.split(",") == ["step", "train/loss", *names]
    assert [row.split(",")[0] for row in rows] == ["0", "2", "4"]
    # every text is the same, so is every prediction, and a third of each set has its label
    assert all(abs(float(row.split(",")[i]) - 1 / 3) < 1e-6 for row in rows for i in (3, 5))


def test_predictions_of_a_number_and_of_classes(bases):
    tokenized = SequenceClassification(bases["bert"], task="stsb", adapter=ADAPTER).eval()
    batch = batch_of(tokenized.tokenizer, TEXTS, records=[{"sentence1": text} for text in TEXTS])
    with torch.no_grad():
        found = tokenized.predict_step(batch, 0)
        logits = tokenized(batch).logits
        assert found == [{"sentence1": t, "score": x} for t, x in zip(TEXTS, logits[:, 0].tolist(), strict=True)]
        module = SequenceClassification(bases["bert"], task="mnli", adapter=ADAPTER).eval()
        found = module.predict_step(batch, 0)
        chances = module(batch).logits.double().exp()
        chances = chances / chances.sum(1, keepdim=True)
    for record, row in zip(found, chances, strict=True):
        assert record["label"] == GLUE["mnli"].class_names[row.argmax()]
        assert abs(record["probability"] - row.max()) < 1e-6


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_keeps_its_head_trainable(quantization, bases):
    pytest.importorskip("bitsandbytes")
    module = SequenceClassification(bases["llama"], num_labels=2, adapter=ADAPTER, quantization=quantization)
    heads = {n: p for n, p in module.named_parameters() if p.requires_grad and "lora_" not in n}
    assert [p.dtype for p in heads.values()] == [torch.float32]
    module.loss({"labels": torch.tensor([0, 1, 0])}, module(batch_of(module.tokenizer, TEXTS))).backward()
    assert all(p.grad.abs().max() > 0 for p in heads.values())


def test_a_base_that_has_a_head_keeps_it(bases, tmp_path):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(bases["bert"], num_labels=3)
    model.save_pretrained(tmp_path / "classifier")
    SequenceClassification(bases["bert"], num_labels=3).tokenizer.save_pretrained(tmp_path / "classifier")
    module = SequenceClassification(str(tmp_path / "classifier"), num_labels=3, adapter=ADAPTER).eval()
    batch = batch_of(module.tokenizer, TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(module(batch).logits, model.eval()(**batch).logits, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"cannot load the base model .*classifier"):
        SequenceClassification(str(tmp_path / "classifier"), num_labels=5)
    with pytest.raises(UserError, match="learns from input_ids, which the data do not give"):
        module({"pixel_values": torch.zeros(1, 3, 8, 8)})


WRONG = {
    "nothing told": ({}, "exactly one of task"),
    "two things told": ({"task": "sst2", "num_labels": 2}, "exactly one of task"),
    "no such task": ({"task": "sst3"}, "unknown task 'sst3'"),
    "no class": ({"num_labels": 0}, "num_labels is 0"),
    "one name": ({"class_names": ["spam"]}, "two or more different names"),
    "equal names": ({"class_names": ["spam", "spam"]}, "two or more different names"),
    "two adapters": ({"num_labels": 2, "adapter": ADAPTER, "adapter_path": "x"}, "not both"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case, bases):
    arguments, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        SequenceClassification(bases["gpt2"], **arguments)


def test_labels_of_tokens_are_refused(bases):
    module = SequenceClassification(bases["gpt2"], num_labels=2, adapter=ADAPTER)
    batch = batch_of(module.tokenizer, TEXTS)
    batch["labels"] = batch["input_ids"]  # as TextData makes them
    with pytest.raises(UserError, match="ClassificationData"):
        module.loss(batch, module(batch))


def test_an_adapter_without_a_head_is_refused(bases, tmp_path):
    export_adapter(CausalLM(bases["gpt2"], adapter=ADAPTER).model, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    with pytest.raises(UserError, match="does not fit the base model"):
        SequenceClassification(bases["gpt2"], num_labels=2, adapter_path=str(config.parent))
    config.write_text(config.read_text().replace('"CAUSAL_LM"', "null"))
    with pytest.raises(UserError, match="neither the base nor the adapter has 'score'"):
        SequenceClassification(bases["gpt2"], num_labels=2, adapter_path=str(config.parent))
