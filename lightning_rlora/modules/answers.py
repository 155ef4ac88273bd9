"""Generated answers, judged and brought together from all processes."""

from collections.abc import Sequence
from typing import Any

from lightning_rlora import collectives
from lightning_rlora.scoring import extract_answer

Answer = dict[str, Any]


def judged(batch: dict[str, Any], completions: Sequence[str]) -> list[Answer]:
    """Compares what was written with what is right.

    Args:
        batch: Questions, with the lists `task`, `number`, `prompt`, `choices` and `gold`.
        completions: What the model wrote after each prompt.

    Returns:
        Of each question the `task` and `number`, the `prompt` and `completion`, the `answer` found in it (None if there
        is none), the right one as `gold`, and whether the two are the same as `correct`.
    """
    questions = zip(*(batch[key] for key in ("task", "number", "prompt", "choices", "gold")), completions, strict=True)
    answers = []
    for task, number, prompt, choices, gold, completion in questions:
        answer = extract_answer(completion, choices)
        answers.append(
            {
                "task": task,
                "number": number,
                "prompt": prompt,
                "completion": completion,
                "answer": answer,
                "gold": gold,
                "correct": answer == gold,
            }
        )
    return answers


def gathered(answers: list[Answer]) -> list[Answer]:
    """The answers of all processes, each question's once.

    Several processes share a set by turns, and some repeat a question so that all have equally many.
    """
    together = [answer for part in collectives.gathered(answers) for answer in part]
    once = {(answer["task"], answer["number"]): answer for answer in together}
    tasks = list(dict.fromkeys(task for task, _ in once))
    return [once[key] for key in sorted(once, key=lambda key: (tasks.index(key[0]), key[1]))]
