"""Reading the answer out of a generated text, and counting right ones.

A text that holds no readable answer gives None, which equals no known answer: it counts as wrong and stops nothing.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MARK = re.compile(r"answer\s+is", re.IGNORECASE)
_FINAL = re.compile("####")  # stands before the final number of GSM8K's solutions
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-\u2212])?"  # in 5-3 and (5)-3 it is no sign
    r"\$?"
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?P<decimals>\.[0-9]+)?|(?<!\w)(?P<fraction>\.[0-9]+))"
    r"(?P<denominator>/[0-9]+)?"
)


def extract_answer(text: str, choices: Sequence[str]) -> str | None:
    """The answer that a text gives: one of the choices or, where there are none to choose from, a number."""
    return extract_choice(text, choices) if choices else extract_number(text)


def extract_choice(text: str, choices: Sequence[str]) -> str | None:
    """The first valid choice after "answer is", or else the first in the text.

    Case and spaces do not matter ("answer2", "ANSWER 2"), but "answer 22" is not "answer2" and "untrue" not "true". A
    letter to choose stands alone; as a small one also without a word after it, or "is a dog" would choose A, and where
    nothing says that it is the answer, "A dog is" does not choose A either.

    Args:
        text: What the model wrote.
        choices: The valid answers, such as Solution1 and Solution2, True and False, or A, B and C.

    Returns:
        The choice as it is written in `choices`, or None.
    """
    mark = _MARK.search(text)
    parts = [(text[mark.end() :], True), (text, False)] if mark else [(text, False)]
    for part, marked in parts:
        found = [
            (match.start(), choice) for choice in choices if (match := _choice_pattern(choice, marked).search(part))
        ]
        if found:
            return min(found)[1]
    return None


def _choice_pattern(choice: str, marked: bool) -> re.Pattern[str]:
    if len(choice) == 1 and choice.isalpha():
        article = r"|\s+(?!is\b)[a-z]" if choice.upper() == "A" and not marked else ""
        return re.compile(rf"(?<!\w)(?:{choice.upper()}(?!\w{article})|{choice.lower()}(?!\w|\s+\w))")
    name = choice.rstrip("0123456789")
    number = choice.removeprefix(name)
    end = rf"\s*{number}(?![0-9])" if number else r"(?!\w)"
    return re.compile(rf"(?<!\w){re.escape(name)}{end}", re.IGNORECASE)


def extract_number(text: str) -> str | None:
    """The first number after "####", or else after "answer is", or else the last number of the text.

    Signs, thousands separators and decimals are understood, currency and percent signs and units passed over. A comma
    that is no thousands separator ends a number, so "1, 2" holds two; fractions are taken as they are written.

    Returns:
        The number in its shortest form ("72" for "$72.00", "1234.5" for "1,234.50"; "1/2" stays), or None.
    """
    for mark in (_FINAL, _MARK):
        begin = mark.search(text)
        if begin and (number := _NUMBER.search(text, begin.end())):
            return _shortest(number)
    numbers = list(_NUMBER.finditer(text))
    return _shortest(numbers[-1]) if numbers else None


def _shortest(number: re.Match[str]) -> str:
    """Works on digits, since a model may write more of them than Python turns into an integer."""
    whole = (number["whole"] or "").replace(",", "").lstrip("0") or "0"
    decimals = (number["decimals"] or number["fraction"] or "").rstrip("0").rstrip(".")
    size = whole + decimals + (number["denominator"] or "")
    return f"-{size}" if number["sign"] and size != "0" else size


def accuracies(answers: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The share of right answers of each task, in the order in which the tasks first appear.

    Args:
        answers: Of each answer the `task` and whether it is `correct`.
    """
    verdicts: dict[str, list[bool]] = {}
    for answer in answers:
        verdicts.setdefault(answer["task"], []).append(answer["correct"])
    return {task: sum(right) / len(right) for task, right in verdicts.items()}
