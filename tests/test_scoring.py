"""Reading answers out of odd texts."""

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_rlora.scoring import accuracies, extract_answer, extract_choice, extract_number

NUMBERS = {
    # GSM8K's own mark
    "She has 3 eggs.\n#### 18": "18",
    "#### 18\n\nQuestion: how many are 5 eggs?\n#### 5": "18",
    "The answer is 4.\n#### 18": "18",
    "####18": "18",
    "#### $1,234.50.": "1234.5",
    "#### -7": "-7",
    "#### five, that is 5 of 6": "5",
    "18 in all. ####": "18",
    # MetaMathQA's
    "2 + 2 = 4, and so the answer is: 72": "72",
    "THE ANSWER  IS\n72": "72",
    "The correct answer is 72 and not 73": "72",
    "The answer is 72. The answer is 73.": "72",
    "There are 72. The answer is above.": "72",
    "The answer is: $\\frac{1}{2}$": "1",  # LaTeX is not understood
    # neither: the last number
    "3 eggs and 4 eggs make 7 eggs": "7",
    "7": "7",
    "1, 2": "2",
    "1,2": "2",
    "between 5-10": "10",
    "16 - 3": "3",
    # forms of a number
    "72.0": "72",
    "72.": "72",
    "072": "72",
    "0.50": "0.5",
    ".5": "0.5",
    "0": "0",
    "-0.0": "0",
    "1,234": "1234",
    "1,234,567.80": "1234567.8",
    "12,34": "34",
    "1,2345": "2345",
    "$5": "5",
    "-$5": "-5",
    "$-5": "-5",
    "\u22125": "-5",
    "(-5)": "-5",
    "+5": "5",
    "50%": "50",
    "5kg": "5",
    "\u00a316": "16",
    "1/2": "1/2",
    "9" * 5000: "9" * 5000,  # more digits than int() takes
    # none
    "": None,
    "no number": None,
    "####": None,
    "The answer is five.": None,
    "...": None,
    "-": None,
    "\u0663": None,  # a digit, but not one of ours
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: repr(text[:30]))
def test_numbers(text):
    assert extract_number(text) == extract_answer(text, ()) == NUMBERS[text]


FOUR = ("Answer1", "Answer2", "Answer3", "Answer4")
LETTERS = ("A", "B", "C")
TRUTH = ("True", "False")
CHOICES = [
    (FOUR, "The correct answer is Answer2", "Answer2"),
    (FOUR, "the correct answer is answer2", "Answer2"),
    (FOUR, "The correct answer is ANSWER 2.", "Answer2"),
    (FOUR, "The correct answer is answer\n2", "Answer2"),
    (FOUR, "The correct answer isanswer2", "Answer2"),
    (FOUR, "answer2", "Answer2"),
    (FOUR, "answer2answer3", "Answer2"),
    (FOUR, "**Answer2**", "Answer2"),
    (FOUR, "Answer2: a cup", "Answer2"),
    (FOUR, "Answer1 is wrong; the correct answer is Answer3, not Answer4", "Answer3"),
    (FOUR, "Answer3, since the answer is clear", "Answer3"),
    (FOUR, "The answer is Answer2\nQuestion: What?\nThe answer is Answer4", "Answer2"),
    (FOUR, "Answer22", None),
    (FOUR, "Answer5", None),
    (FOUR, "Answer5 or Answer4", "Answer4"),
    (FOUR, "The correct answer is 2", None),
    (FOUR, "The correct answer is", None),
    (FOUR, "", None),
    (FOUR[:3], "The correct answer is Answer4", None),
    (("answer1", "answer2"), "The correct answer is Answer2", "answer2"),
    (("Solution1", "Solution2"), "solution 2", "Solution2"),
    (("Ending1", "Ending2", "Ending3", "Ending4"), "The correct answer is Ending4", "Ending4"),
    (("Option1", "Option2"), "Option1/Option2", "Option1"),
    (TRUTH, "The correct answer is false", "False"),
    (TRUTH, "TRUE.", "True"),
    (TRUTH, "It is untrue", None),
    (TRUTH, "Truely", None),
    (TRUTH, "yes", None),
    (TRUTH, "True? No, False", "True"),
    (LETTERS, "The correct answer is B", "B"),
    (LETTERS, "The correct answer is b", "B"),
    (LETTERS, "The correct answer is (c).", "C"),
    (LETTERS, "B because it is", "B"),
    (LETTERS, "The correct answer is a", "A"),
    (LETTERS, "The correct answer is a dog", None),
    (LETTERS, "It is a dog, so B", "B"),
    (LETTERS, "A person would be happy. I think B.", "B"),
    (LETTERS, "A is right, not B", "A"),
    (LETTERS, "The answer is A because of B", "A"),
    (LETTERS, "D", None),
    (LETTERS, "ABC", None),
]


@pytest.mark.parametrize(("choices", "text", "expected"), CHOICES)
def test_choices(choices, text, expected):
    assert extract_choice(text, choices) == extract_answer(text, choices) == expected


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**12), max_value=10**12))
def test_a_number_is_itself_however_it_is_written(value):
    for written in (f"{value:,}", f"{value}", f"{value:,}00"):
        for text in (written, f"First 5, then {written}.", f"#### {written}\nand 9", f"The answer is ${written}!"):
            assert Fraction(extract_number(text)) == Fraction(Decimal(value))
    assert extract_number(f"{value:,}") == extract_number(f"{value}00")  # one form for each number


@given(st.text() | st.from_regex(r"[-0-9.,/$%# ]{0,30}|(the answer is|answer ?[0-9]|[ABC. ])*", fullmatch=True))
def test_no_text_is_too_odd(text):
    number = extract_number(text)
    assert number is None or extract_number(number) == number
    for choices in (FOUR, LETTERS, TRUTH):
        assert extract_choice(text, choices) in (None, *choices)


def test_accuracies_keep_the_order_of_the_tasks():
    verdicts = {"piqa": [True, False, False, True], "boolq": [True], "arc_easy": [False, False, True]}
    answers = [{"task": task, "correct": correct} for task, rights in verdicts.items() for correct in rights]
    assert list(accuracies(answers).items()) == [("piqa", 0.5), ("boolq", 1.0), ("arc_easy", 1 / 3)]
    assert accuracies([]) == {}
