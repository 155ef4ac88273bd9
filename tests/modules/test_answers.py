"""Questions through Trainer.test and `rlora test`: a model made to answer by rule scores exactly as expected."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from task_records import RECORDS

import lightning_rlora.trainer_cli  # noqa: F401  - its loggers must not take hold of one test's captured stream
from lightning_rlora import CausalLM, ReasoningData
from lightning_rlora.cli import main
from lightning_rlora.data.tasks import TASKS
from lightning_rlora.modules.answers import gathered

RIGHT, WRONG = True, False
REPLIES = {
    "boolq": [  # the gold answer is True
        ("The correct answer is True", RIGHT),
        ("the correct answer is true.", RIGHT),
        ("The correct answer is False", WRONG),
        ("yes", WRONG),
    ],
    "piqa": [  # Solution1
        ("The correct answer is Solution1", RIGHT),
        ("solution 1", RIGHT),
        ("Solution 1 or Solution2", RIGHT),
        ("Solution2 or Solution 1", WRONG),
        ("The correct answer is 1", WRONG),
    ],
    "siqa": [  # B
        ("The correct answer is B", RIGHT),
        ("b", RIGHT),
        ("A", WRONG),
        ("The correct answer is a bee", WRONG),
        ("", WRONG),
        ("D", WRONG),
    ],
    "hellaswag": [("The correct answer is Ending2", RIGHT), ("Ending22", WRONG), ("bakes it.", WRONG)],  # Ending2
    "winogrande": [("Option1 is wrong. The correct answer is Option2", RIGHT), ("OPTION2", RIGHT)],  # Option2
    "arc_easy": [  # Answer3
        ("The correct answer is answer3", RIGHT),
        ("The correct answer is answer 3", RIGHT),
        ("answer3answer4", RIGHT),
        ("The correct answer is C", WRONG),
        ("answer33", WRONG),
        ("Answer4", WRONG),
        ("Question: What?", WRONG),
    ],
    "arc_challenge": [("Answer4", WRONG), ("The correct answer is Answer1", WRONG)],  # Answer3, and there is no fourth
    "openbookqa": [
        ("The correct answer is Answer2\nThe correct answer is Answer4", RIGHT),
        ("a cup", WRONG),
    ],  # Answer2
    "gsm8k": [  # 1600
        ("8 times 200 is 1,600.\n#### 1,600", RIGHT),
        ("#### 1600\n\nHow many are two?\n#### 2", RIGHT),
        ("The answer is $1600.00", RIGHT),
        ("so 1600 in 8 parts make 1,600.", RIGHT),
        ("1600, or 8 times 200", WRONG),
        ("1 600", WRONG),
        ("1.600", WRONG),
        ("-1600", WRONG),
        ("no number", WRONG),
        ("", WRONG),
        ("The answer is 1 and 1600", WRONG),
    ],
}
EXPECTED = {  # counted by hand
    "boolq": 2 / 4,
    "piqa": 3 / 5,
    "siqa": 2 / 6,
    "hellaswag": 1 / 3,
    "winogrande": 2 / 2,
    "arc_easy": 3 / 7,
    "arc_challenge": 0 / 2,
    "openbookqa": 1 / 2,
    "gsm8k": 4 / 11,
}


def quiet_trainer(folder, **options):
    flags = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **flags, **options)


def numbered(task, n):
    """The record of a task, told from its other copies by a number in its question; the gold answer is the same."""
    record = dict(RECORDS[task])
    name = next(name for name, value in record.items() if isinstance(value, str) and name != "activity_label")
    record[name] = f"{n}: {record[name]}"
    return record | ({"answer": "8 times 200 is 1,600.\n#### 1,600"} if task == "gsm8k" else {})


@pytest.fixture
def ruled(tmp_path):
    """A data module of all tasks, and a language model whose generation looks the reply up."""
    files, rules = {}, {}
    module = CausalLM(adapter={"r": 2})
    for task, replies in REPLIES.items():
        records = [numbered(task, n) for n in range(len(replies))]
        files[task] = str(tmp_path / f"{task}.jsonl")
        Path(files[task]).write_text("\n".join(map(json.dumps, records)))
        for record, (reply, _) in zip(records, replies, strict=True):
            question = TASKS[task].question(record, 1)
            rules[f"{question.system}\n\n{question.user}\n"] = reply

    def generate(input_ids, attention_mask, **options):
        assert options["do_sample"] is False
        prompts = [
            module.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(input_ids, attention_mask, strict=True)
        ]
        new = [module.tokenizer(rules[prompt])["input_ids"] for prompt in prompts]
        longest, end = max(map(len, new)) + 1, module.tokenizer.eos_token_id
        padded = torch.tensor([ids + [end] * (longest - len(ids)) for ids in new])
        return torch.cat([input_ids, padded], dim=1)

    module.model.generate = generate
    return module, ReasoningData(test=files, max_length=1024, batch_size=4), rules


def test_a_model_that_answers_by_rule_scores_exactly_as_expected(ruled, tmp_path):
    module, data, rules = ruled
    assert len(rules) == sum(map(len, REPLIES.values()))  # no two prompts are the same
    trainer = quiet_trainer(tmp_path)
    trainer.test(module, data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert scores.pop("test/accuracy") == pytest.approx(sum(EXPECTED.values()) / 9, abs=1e-7)  # float32
    assert scores == {f"test/accuracy/{task}": pytest.approx(share, abs=1e-7) for task, share in EXPECTED.items()}
    answers = iter(module.answers)
    for task, replies in REPLIES.items():
        for number, (reply, verdict) in enumerate(replies, start=1):
            answer = next(answers)
            assert (answer["task"], answer["number"], answer["completion"]) == (task, number, reply)
            assert answer["correct"] is verdict, reply
    assert next(answers, None) is None
    trainer.test(module, data, verbose=False)  # starts to count anew
    assert len(module.answers) == len(rules)


def test_two_processes_score_the_same_though_they_repeat_questions(ruled, tmp_path):
    module, data, _ = ruled
    trainer = quiet_trainer(tmp_path, strategy="ddp_fork", devices=2)
    trainer.test(module, data, verbose=False)
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert scores.pop("test/accuracy") == pytest.approx(sum(EXPECTED.values()) / 9, abs=1e-7)
    assert scores == {f"test/accuracy/{task}": pytest.approx(share, abs=1e-7) for task, share in EXPECTED.items()}


def test_answers_are_counted_once_and_in_order():
    rows = [("piqa", 2), ("boolq", 1), ("piqa", 1), ("piqa", 2), ("boolq", 10), ("boolq", 2)]
    answers = [{"task": task, "number": number, "correct": True} for task, number in rows]
    kept = [(answer["task"], answer["number"]) for answer in gathered(answers)]
    assert kept == [("piqa", 1), ("piqa", 2), ("boolq", 1), ("boolq", 2), ("boolq", 10)]


def test_rlora_test_writes_the_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for task in ("boolq", "gsm8k"):
        Path(f"{task}.jsonl").write_text("\n".join(json.dumps(numbered(task, n)) for n in range(3)))
    arguments = [
        *("test", "--model", "CausalLM", "--model.max_new_tokens", "4", "--data", "ReasoningData"),
        *("--data.test", '{"boolq": "boolq.jsonl", "gsm8k": "gsm8k.jsonl"}', "--data.batch_size", "2"),
        *("--trainer.default_root_dir", "run", "--trainer.accelerator", "cpu"),
        *("--trainer.enable_progress_bar", "false"),
    ]
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    scores = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("test/")}
    answers = [json.loads(line) for line in Path("run/answers.jsonl").read_text().splitlines()]
    assert [(answer["task"], answer["number"]) for answer in answers] == [
        *(("boolq", 1), ("boolq", 2), ("boolq", 3), ("gsm8k", 1), ("gsm8k", 2), ("gsm8k", 3))
    ]
    assert all(answer["correct"] == (answer["answer"] == answer["gold"]) for answer in answers)
    assert all(answer["prompt"] and answer["completion"] for answer in answers)
    rights = [sum(answer["correct"] for answer in answers if answer["task"] == task) for task in ("boolq", "gsm8k")]
    assert scores == {
        "test/accuracy/boolq": round(rights[0] / 3, 4),
        "test/accuracy/gsm8k": round(rights[1] / 3, 4),
        "test/accuracy": round(sum(rights) / 6, 4),
    }
    assert "6 answers written to run/answers.jsonl" in lines
    assert [path.name for path in Path("run").iterdir()] == ["answers.jsonl"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--data.test", "[bolq]"])
    assert end.value.code == 2
    assert "unknown task 'bolq'" in capsys.readouterr().err
