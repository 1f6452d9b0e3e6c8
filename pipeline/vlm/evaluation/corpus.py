"""Metrics that one pair of texts does not have: CIDEr weighs words by how rare they are, yes/no figures are counts over all."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.vlm.evaluation.metrics import normalise, words

LONGEST = 4  # words of an n-gram
WIDTH = 6.0  # of the penalty for another length
DRAWS = 1000  # of the bootstrap
SEED = 0


class Cider:
    """CIDEr-D (Vedantam et al. 2015): cosine of n-grams weighed by their rarity, 10 for the reference itself.

    Args:
        documents: the references of each picture, all of those that are scored.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        self._in, self._documents = Counter[tuple[str, ...]](), 0
        for references in documents:
            self._in.update({gram for reference in references for gram in _grams(reference)})
            self._documents += 1
        self._most = math.log(max(1, self._documents))

    def __call__(self, answer: str, references: Sequence[str]) -> float:
        """Of one answer, the mean over its references."""
        given, found = self._weigh(answer), 0.0
        for reference in references:
            wanted = self._weigh(reference)
            near = math.exp(-((_size(given) - _size(wanted)) ** 2) / (2 * WIDTH**2))
            found += near * sum(_cosine(one, other) for one, other in zip(given, wanted, strict=True)) / LONGEST
        return 10 * found / len(references)

    def _weigh(self, text: str) -> list[dict[tuple[str, ...], tuple[float, int]]]:
        """By length of n-gram: its weight and its count."""
        made: list[dict[tuple[str, ...], tuple[float, int]]] = [{} for _ in range(LONGEST)]
        for gram, count in _grams(text).items():
            made[len(gram) - 1][gram] = count * (self._most - math.log(max(1, self._in[gram]))), count
        return made


def _grams(text: str) -> Counter[tuple[str, ...]]:
    found = words(text)
    return Counter(tuple(found[at : at + size]) for size in range(1, LONGEST + 1) for at in range(len(found) - size + 1))


def _size(weighed: list[dict[tuple[str, ...], tuple[float, int]]]) -> int:
    """The length that is compared: of pairs of words, as the metric's own code counts."""
    return sum(count for _, count in weighed[1].values())


def _cosine(one: dict[tuple[str, ...], tuple[float, int]], other: dict[tuple[str, ...], tuple[float, int]]) -> float:
    """Clipped: a word that is said too often does not count more than the reference says it."""
    lengths = math.sqrt(sum(weight**2 for weight, _ in one.values()) * sum(weight**2 for weight, _ in other.values()))
    shared = sum(min(weight, other[gram][0]) * other[gram][0] for gram, (weight, _) in one.items() if gram in other)
    return shared / lengths if lengths else 0.0


@dataclass(slots=True)
class YesNo:
    """Answers to questions whose reference is yes or no, counted as POPE does (Li et al. 2023); others are left out.

    Attributes:
        counts: int64 [2, 3]: reference yes or no, by answer yes, no or neither.
    """

    counts: np.ndarray

    @classmethod
    def of(cls, answers: Sequence[str], references: Sequence[str]) -> "YesNo":
        """Those of one list of answers; lists are added up with `+`."""
        counts = np.zeros((2, 3), np.int64)
        for (answer, reference), count in Counter(zip(answers, references, strict=True)).items():
            wanted = _side(reference, whole=True)
            if wanted < 2:
                counts[wanted, _side(answer, whole=False)] += count
        return cls(counts)

    def __add__(self, other: "YesNo") -> "YesNo":
        return YesNo(self.counts + other.counts)

    @property
    def questions(self) -> int:
        return int(self.counts.sum())

    def figures(self) -> dict[str, Any]:
        """questions, accuracy, precision, recall, f1 of yes, the share of yes among answers and among references.

        f1_low and f1_high: its 95 % interval, by drawing as many questions anew.
        """
        if not self.questions:
            return {"questions": 0}
        drawn = np.random.default_rng(SEED).multinomial(self.questions, self.counts.reshape(-1) / self.questions, DRAWS)
        low, high = np.quantile([_ratios(one.reshape(2, 3))["f1"] for one in drawn], [0.025, 0.975])
        found = _ratios(self.counts) | {"f1_low": float(low), "f1_high": float(high)}
        return {"questions": self.questions, **{name: round(value, 6) for name, value in found.items()}}


def _ratios(counts: np.ndarray) -> dict[str, float]:
    (hit, missed, lost), (false, right, _) = counts.tolist()
    every = max(1, int(counts.sum()))
    precision, recall = hit / max(1, hit + false), hit / max(1, hit + missed + lost)
    return {
        "accuracy": (hit + right) / every,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hit else 0.0,
        "yes_share": (hit + false) / every,
        "yes_share_reference": (hit + missed + lost) / every,
    }


def _side(text: str, *, whole: bool) -> int:
    """0 for yes, 1 for no, 2 for neither; `whole`: nothing else may be said."""
    said = normalise(text).split()
    word = said[0] if said and (len(said) == 1 or not whole) else ""
    return {"yes": 0, "no": 1}.get(word, 2)
