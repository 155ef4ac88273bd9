"""From records to questions: the prompts to the letter, and one clear line for records that do not fit."""

import re

import pytest
from task_records import RECORDS

from lightning_rlora.data.tasks import TASKS
from lightning_rlora.errors import UserError

ONLY = " Answer in the given format only."
EXPECTED = {
    "boolq": (
        "Decide from the passage whether the answer to the question is true or false." + ONLY,
        "Passage: Rain is water that falls.\nQuestion: is rain wet\nAnswer format: True/False",
        "The correct answer is True",
        "True",
    ),
    "piqa": (
        "Choose the solution that better reaches the goal." + ONLY,
        "Goal: Open a jar.\nSolution1: Turn the lid.\nSolution2: Turn the floor.\nAnswer format: Solution1/Solution2",
        "The correct answer is Solution1",
        "Solution1",
    ),
    "siqa": (
        "Choose the answer that fits the question about the situation best." + ONLY,
        "Context: Kim gave Lee a gift.\nQuestion: How would Lee feel?\nA: angry\nB: pleased\nC: asleep\n"
        "Answer format: A/B/C",
        "The correct answer is B",
        "B",
    ),
    "hellaswag": (
        "Choose the ending that continues the context best." + ONLY,
        "Activity: Baking\nContext: A man mixes dough. He\nEnding1: sings to it.\nEnding2: bakes it.\n"
        "Ending3: reads it.\nEnding4: sells the sea.\nAnswer format: Ending1/Ending2/Ending3/Ending4",
        "The correct answer is Ending2",
        "Ending2",
    ),
    "winogrande": (
        "Choose the option that belongs in the blank (_) of the sentence." + ONLY,
        "Sentence: The cup was not in the bag because the _ was too small.\nOption1: cup\nOption2: bag\n"
        "Answer format: Option1/Option2",
        "The correct answer is Option2",
        "Option2",
    ),
    "arc_easy": (
        "Choose the correct answer to the question." + ONLY,
        "Question: What drains pasta?\nAnswer1: a pan\nAnswer2: a cup\nAnswer3: a sieve\nAnswer4: a lid\n"
        "Answer format: Answer1/Answer2/Answer3/Answer4",
        "The correct answer is Answer3",
        "Answer3",
    ),
    "arc_challenge": (
        "Choose the correct answer to the question." + ONLY,
        "Question: What boils?\nAnswer1: ice\nAnswer2: rock\nAnswer3: water\nAnswer format: Answer1/Answer2/Answer3",
        "The correct answer is Answer3",
        "Answer3",
    ),
    "openbookqa": (
        "Choose the correct answer to the question." + ONLY,
        "Question: You drink from\nAnswer1: a pan\nAnswer2: a cup\nAnswer3: a sieve\nAnswer4: a lid\n"
        "Answer format: Answer1/Answer2/Answer3/Answer4",
        "The correct answer is Answer2",
        "Answer2",
    ),
    "gsm8k": (
        "Solve the problem step by step and end with the answer.",
        "How many legs have two spiders?",
        "2 times 8 is 16.\n#### 16",
        "16",
    ),
    "metamath": (
        "Solve the problem step by step and end with the answer.",
        "What is half of 9?",
        "Half of 9 is 4.5.\nThe answer is: 4.5",
        "4.5",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_to_the_letter(name):
    question = TASKS[name].question(RECORDS[name], 1)
    assert (question.system, question.user, question.assistant, question.gold) == EXPECTED[name]
    last = question.user.rpartition("Answer format: ")[2]
    assert question.choices == (() if name in ("gsm8k", "metamath") else tuple(last.split("/")))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_takes_the_older_template(name):
    prompt = "Choose: what is wet?\n\nAnswer1: ice Answer2: rain\n\nAnswer format: answer1/answer2"
    record = {"instruction": prompt, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
    question = TASKS[name].question(record, 1)
    assert (question.system, question.user, question.assistant) == ("", prompt, "the correct answer is answer2")
    assert (question.choices, question.gold) == (("answer1", "answer2"), "answer2")
    number = TASKS[name].question({"instruction": "Add", "input": "1, 2", "output": "It is 3.", "answer": 3.0}, 1)
    assert (number.user, number.choices, number.gold) == ("Add\n1, 2", (), "3")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("boolq", {"answer": "yes"}, "record 7: the field 'answer' is 'yes', not true or false"),
        ("piqa", {"label": -1}, "'label' is '-1', not the number of a choice (0 to 1): take a split with public"),
        ("siqa", {"label": "0"}, "'label' is '0', not the number of a choice (1 to 3)"),
        ("hellaswag", {"label": ""}, "'label' is '', not the number of a choice (0 to 3)"),
        ("hellaswag", {"endings": "one"}, "the field 'endings' is not a list of strings"),
        ("winogrande", {"answer": "3"}, "not the number of a choice (1 to 2)"),
        ("arc_easy", {"answerKey": "E"}, "no choice has the label 'E'"),
        ("arc_easy", {"choices": []}, "'choices' does not hold lists"),
        ("openbookqa", {"question_stem": None}, "'question_stem' is a NoneType, not a string"),
        ("gsm8k", {"answer": 5}, "the field 'answer' is a int, not a string"),
        ("boolq", {"instruction": "A?\nAnswer format: a/b", "output": "x", "answer": "z"}, "'z' is none of a, b"),
        ("boolq", {"instruction": "A?\nAnswer format: a/b", "answer": "a"}, "has no field 'output'"),
    ],
)
def test_records_that_do_not_fit(name, change, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TASKS[name].question(RECORDS[name] | change, 7)


@pytest.mark.parametrize(
    ("final", "gold"),
    [("72", "72"), ("$1,200.", "1200"), ("-3.50", "-3.5"), (r"\\frac{1}{3}", None), ("x^2+3", None), ("1/2", None)],
)
def test_metamath_is_scored_where_the_answer_is_a_number(final, gold):
    record = {"query": "What?", "response": f"First 5.\nThe answer is: {final}"}
    assert TASKS["metamath"].question(record, 1).gold == gold


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_field_is_named(name):
    for gone in set(RECORDS[name]) - {"type"}:
        record = {key: value for key, value in RECORDS[name].items() if key != gone}
        with pytest.raises(UserError, match=f"record 2 has no field '{gone}'"):
            TASKS[name].question(record, 2)
