"""An embedded data set of English prose: the language reference that every CPython carries."""

from typing import Any

HELD_OUT_EVERY = 8


def python_topics(stage: str) -> list[dict[str, Any]]:
    """Returns the topics of ``help()``: about 80 documents, half a million characters; they vary with Python's version.

    The split is by topic: of the sorted names every eighth belongs to validation, test and predict, the rest to train,
    so no sentence of a held-out topic was trained on.

    Args:
        stage: "train" gives the training topics, anything else the held-out ones.

    Returns:
        Records with the fields "topic" and "text".
    """
    from pydoc_data.topics import topics

    held_out = stage != "train"
    names = [name for i, name in enumerate(sorted(topics)) if (i % HELD_OUT_EVERY == 0) == held_out]
    return [{"topic": name, "text": topics[name]} for name in names]
