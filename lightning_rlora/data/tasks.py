"""The eight commonsense tasks, GSM8K and MetaMathQA: from a record of the public set to a question and its answer.

The prompts have the layout of arXiv 2507.12142: what to choose as the system's turn; the item's fields, one a line, and
the answer format as the user's; "The correct answer is " and the answer as the assistant's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_rlora.data.examples import field
from lightning_rlora.data.sources import Record
from lightning_rlora.errors import UserError
from lightning_rlora.scoring import extract_answer, extract_number


@dataclass(frozen=True)
class Question:
    """A question as one turn of a conversation, with all that scoring needs.

    Attributes:
        system: What to do; may be empty.
        user: The question.
        assistant: The reply to learn.
        choices: The valid answers; empty where the answer is a number.
        gold: The right answer as `extract_answer` gives it, or None if the set does not hold a readable one.
    """

    system: str
    user: str
    assistant: str
    choices: tuple[str, ...]
    gold: str | None


@dataclass(frozen=True)
class Task:
    """Where the public set of a task lies on the hub, and how its records become questions.

    Attributes:
        hub: Hub id.
        config: Configuration of the hub data set.
        test: Split with public labels to test on; None if there is no such split.
        read: Makes a question of a record; its second argument is the record's number, for error messages.
    """

    hub: str
    config: str | None
    test: str | None
    read: Callable[[Record, int], Question]

    def question(self, record: Record, number: int) -> Question:
        """Reads a record of the public set, or one of instruction, input, output and answer.

        The latter is the older template, in which the commonsense tasks are also handed around; its last line lists the
        choices as "Answer format: true/false" does. Its prompt is kept as it is.

        Args:
            record: The record.
            number: Its number, counted from 1, for error messages.

        Raises:
            UserError: A field is missing, or holds something else than it should.
        """
        return _older_template(record, number) if "instruction" in record else self.read(record, number)


def _boolq(record: Record, number: int) -> Question:
    lines = {"Passage": _text(record, "passage", number), "Question": _text(record, "question", number)}
    gold = field(record, "answer", number)
    if not isinstance(gold, bool):
        raise UserError(f"record {number}: the field 'answer' is {gold!r}, not true or false")
    return _choose("Decide from the passage whether the answer to the question is true or false.", lines, gold)


def _piqa(record: Record, number: int) -> Question:
    solutions = _numbered("Solution", [_text(record, name, number) for name in ("sol1", "sol2")])
    lines = {"Goal": _text(record, "goal", number)}
    gold = _pick(list(solutions), record, "label", number, first=0)
    return _choose("Choose the solution that better reaches the goal.", lines, gold, solutions)


def _siqa(record: Record, number: int) -> Question:
    answers = {letter: _text(record, f"answer{letter}", number) for letter in "ABC"}
    lines = {"Context": _text(record, "context", number), "Question": _text(record, "question", number)}
    gold = _pick(list(answers), record, "label", number, first=1)
    return _choose("Choose the answer that fits the question about the situation best.", lines, gold, answers)


def _hellaswag(record: Record, number: int) -> Question:
    endings = _numbered("Ending", _texts(record, "endings", number))
    lines = {"Activity": _text(record, "activity_label", number), "Context": _text(record, "ctx", number)}
    gold = _pick(list(endings), record, "label", number, first=0)
    return _choose("Choose the ending that continues the context best.", lines, gold, endings)


def _winogrande(record: Record, number: int) -> Question:
    options = _numbered("Option", [_text(record, name, number) for name in ("option1", "option2")])
    lines = {"Sentence": _text(record, "sentence", number)}
    gold = _pick(list(options), record, "answer", number, first=1)
    return _choose("Choose the option that belongs in the blank (_) of the sentence.", lines, gold, options)


def _school_exam(stem: str) -> Callable[[Record, int], Question]:
    """ARC and OpenBookQA, which differ in the name of one field; an item has three to five answers."""

    def read(record: Record, number: int) -> Question:
        choices = field(record, "choices", number)
        if not isinstance(choices, dict):
            raise UserError(f"record {number}: the field 'choices' does not hold lists of `text` and `label`")
        answers = _numbered("Answer", _texts(choices, "text", number))
        labels, key = _texts(choices, "label", number), _text(record, "answerKey", number)
        if key not in labels or len(labels) != len(answers):
            raise UserError(f"record {number}: no choice has the label {key!r}: take a split with public answers")
        gold = list(answers)[labels.index(key)]
        return _choose(
            "Choose the correct answer to the question.", {"Question": _text(record, stem, number)}, gold, answers
        )

    return read


_SOLVE = "Solve the problem step by step and end with the answer."  # the same, to train on one and test on the other


def _gsm8k(record: Record, number: int) -> Question:
    solution = re.sub(r"<<.*?>>", "", _text(record, "answer", number))  # marks for a calculator, which a model has not
    return Question(_SOLVE, _text(record, "question", number), solution, (), extract_number(solution))


def _metamath(record: Record, number: int) -> Question:
    solution = _text(record, "response", number)
    final = solution.rpartition("The answer is:")[2].strip().rstrip(".")
    # many answers are formulas, of which a number would be only a part
    gold = extract_number(final) if re.fullmatch(r"-?\$?[0-9,]*\.?[0-9]+%?", final) else None
    return Question(_SOLVE, _text(record, "query", number), solution, (), gold)


TASKS = {
    "boolq": Task("google/boolq", None, "validation", _boolq),
    "piqa": Task("lighteval/piqa", None, "validation", _piqa),  # the publishers' own copies of this and the next need
    "siqa": Task("lighteval/siqa", None, "validation", _siqa),  # a script, which `datasets` no longer runs
    "hellaswag": Task("Rowan/hellaswag", None, "validation", _hellaswag),
    "winogrande": Task("allenai/winogrande", "winogrande_xl", "validation", _winogrande),
    "arc_easy": Task("allenai/ai2_arc", "ARC-Easy", "test", _school_exam("question")),
    "arc_challenge": Task("allenai/ai2_arc", "ARC-Challenge", "test", _school_exam("question")),
    "openbookqa": Task("allenai/openbookqa", "main", "test", _school_exam("question_stem")),
    "gsm8k": Task("openai/gsm8k", "main", "test", _gsm8k),
    "metamath": Task("meta-math/MetaMathQA", None, None, _metamath),
}


def _choose(
    what: str, lines: Mapping[str, str], gold: str | bool, options: Mapping[str, str] | None = None
) -> Question:
    """The paper's layout: labelled lines, the last of which is the answer format."""
    choices = tuple(options or ("True", "False"))
    labelled = [f"{label}: {_one_line(text)}" for label, text in {**lines, **(options or {})}.items()]
    user = "\n".join([*labelled, f"Answer format: {'/'.join(choices)}"])
    system = f"{what} Answer in the given format only."
    return Question(system, user, f"The correct answer is {gold}", choices, str(gold))


def _older_template(record: Record, number: int) -> Question:
    instruction = "\n".join(
        text for name in ("instruction", "input") if name in record and (text := _text(record, name, number)).strip()
    )
    found = re.search(r"Answer format:\s*(\S+/\S+)\s*$", instruction)
    choices = tuple(found[1].split("/")) if found else ()
    answer = field(record, "answer", number)
    gold = extract_answer(str(answer), choices)
    if choices and gold is None:
        raise UserError(f"record {number}: the answer {answer!r} is none of {', '.join(choices)}")
    return Question("", instruction, _text(record, "output", number), choices, gold)


def _numbered(label: str, texts: Sequence[str]) -> dict[str, str]:
    return {f"{label}{n}": text for n, text in enumerate(texts, start=1)}


def _pick(choices: Sequence[str], record: Record, name: str, number: int, first: int) -> str:
    """The choice that a field tells by number, an int or a string, counted from `first`."""
    label = str(field(record, name, number))
    if not label.isdecimal() or not 0 <= int(label) - first < len(choices):
        raise UserError(
            f"record {number}: the field {name!r} is {label!r}, not the number of a choice ({first} to"
            f" {first + len(choices) - 1}): take a split with public answers"
        )
    return choices[int(label) - first]


def _text(record: Record, name: str, number: int) -> str:
    value = field(record, name, number)
    if not isinstance(value, str):
        raise UserError(f"record {number}: the field {name!r} is a {type(value).__name__}, not a string")
    return value


def _texts(record: Record, name: str, number: int) -> list[str]:
    value = field(record, name, number)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise UserError(f"record {number}: the field {name!r} is not a list of strings")
    return value


def _one_line(text: str) -> str:
    return " ".join(text.split())
