"""Which metrics are told of a set of questions: those that `evaluate.metrics` names, or those that fit the answers."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.vlm.evaluation.choices import find_options
from pipeline.vlm.evaluation.corpus import YesNo
from pipeline.vlm.evaluation.metrics import words

SHORT, PHRASE = 3, 8  # words
LEAST = 0.1  # share of the questions from which on a metric for one kind of them is told


def choose_metrics(
    asked: Literal["auto"] | Sequence[str], questions: Sequence[str], references: Sequence[str]
) -> tuple[list[str], str]:
    """The metrics, and in words why these.

    `auto`: by the median length of the references in words short answers, phrases or sentences have their own; figures of
    yes and no, and multiple choice, come beside them where at least a tenth of the questions is of that kind.
    """
    if asked != "auto":
        return list(asked), "as evaluate.metrics names them"
    lengths = sorted(len(words(text)) for text in references)
    median = lengths[len(lengths) // 2] if lengths else 0
    if median <= SHORT:
        chosen = ["exact", "vqa", "contains"]
    else:
        chosen = ["exact", "token_f1", "anls"] if median <= PHRASE else ["token_f1", "rouge_l", "cider"]
    sides = YesNo.of(references, references).counts.sum(1)
    if sides.min() > 0 and sides.sum() >= LEAST * len(references):
        chosen.append("yes_no")
    options = np.array([find_options(*pair) is not None for pair in zip(questions, references, strict=True)])
    if options.any() and options.mean() >= LEAST:
        chosen.append("choice")
    return chosen, f"by the answers' median length of {median} word{'s' * (median != 1)}"
