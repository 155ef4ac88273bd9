"""The tasks of GLUE as a model sees them: their classes and how they are scored."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torchmetrics import Metric, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)


class LabelTask(NamedTuple):
    """What a task asks for.

    Attributes:
        class_names: The classes in the order of GLUE's labels; none for a number (regression).
        metrics: Names of its metrics in `METRICS`.
        extra_sets: Names of the validation sets beyond the first.
    """

    class_names: tuple[str, ...]
    metrics: tuple[str, ...]
    extra_sets: tuple[str, ...] = ()


GLUE = {
    "cola": LabelTask(("unacceptable", "acceptable"), ("matthews",)),
    "mnli": LabelTask(("entailment", "neutral", "contradiction"), ("accuracy",), ("mismatched",)),
    "mrpc": LabelTask(("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "qnli": LabelTask(("entailment", "not_entailment"), ("accuracy",)),
    "qqp": LabelTask(("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "rte": LabelTask(("entailment", "not_entailment"), ("accuracy",)),
    "sst2": LabelTask(("negative", "positive"), ("accuracy",)),
    "stsb": LabelTask((), ("pearson", "spearman")),
    "wnli": LabelTask(("not_entailment", "entailment"), ("accuracy",)),
}
"""GLUE's tasks by their names in the data set `nyu-mll/glue`."""

METRICS: dict[str, Callable[[int], Metric]] = {
    "accuracy": lambda classes: MulticlassAccuracy(classes, average="micro"),
    "f1": lambda classes: BinaryF1Score(),  # of class 1
    "f1_macro": lambda classes: MulticlassF1Score(classes, average="macro"),
    "matthews": lambda classes: MulticlassMatthewsCorrCoef(classes),
    "pearson": lambda classes: PearsonCorrCoef(),
    "spearman": lambda classes: SpearmanCorrCoef(),
}
"""What makes each metric from the number of classes; all take predictions and targets of shape (batch,)."""


def custom_task(class_names: Sequence[str]) -> LabelTask:
    """A task of one's own, scored by accuracy and macro F1, or for a number as STS-B is."""
    return LabelTask(tuple(class_names), ("accuracy", "f1_macro")) if class_names else GLUE["stsb"]
