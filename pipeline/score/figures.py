"""What the scores of a benchmark's questions come to, with intervals: every figure is a function of the questions' weights.

A bootstrap draw gives each unit (one question, or those that are right or wrong together) the number of times it was drawn;
all weights one give the figure itself. So whatever a benchmark defines, means of means or F1, has its interval.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS, SEED = 1000, 0
FEW = 100  # questions below which a figure says little
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")  # of MME's categories

Figures = Mapping[str, Callable[[np.ndarray], float]]  # name -> its value at weights [units]; the first one is told first


@dataclass(frozen=True, slots=True)
class Scored:
    """All questions of a task, in order.

    Attributes:
        scores: float64 [n], 0 to 1.
        answers, references: [n] texts.
        groups: [n] what each is counted under.
        units: int64 [n], the number of each one's unit; units are numbered from 0 without a gap.
    """

    scores: np.ndarray
    answers: Sequence[str]
    references: Sequence[str]
    groups: Sequence[str]
    units: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """float64 [units]: 1 where all questions of a unit are right."""
        missed = np.bincount(self.units, self.scores < 1)
        return (missed == 0).astype(np.float64)


def accuracy(found: Scored) -> Figures:
    """The mean score."""
    return {"accuracy": lambda weights: _mean(found.scores, weights[found.units])}


def units_right(found: Scored) -> Figures:
    """MMBench's circular evaluation: the share of questions that are answered rightly however their options are turned round."""
    return {"accuracy": lambda weights: _mean(found.whole, weights)}


def yes_no(found: Scored) -> Figures:
    """POPE's: accuracy, F1 of "yes", and the share of answers that are yes. An answer that is neither counts in accuracy only.

    lmms-eval's `pope_yes_ratio` is the share of references that are yes; the benchmark's own is that of answers, as here.
    """
    said = np.array([answer.lower().strip() for answer in found.answers])
    true = np.array([reference.lower().strip() == "yes" for reference in found.references])
    yes, no = said == "yes", said == "no"

    def rates(weights: np.ndarray) -> tuple[float, float]:
        each = weights[found.units]
        hits, false, missed = (float(each[which].sum()) for which in (yes & true, yes & ~true, no & true))
        return _share(hits, hits + false), _share(hits, hits + missed)

    def f1(weights: np.ndarray) -> float:
        precision, recall = rates(weights)
        return _share(2 * precision * recall, precision + recall)

    return {
        **accuracy(found),
        "f1": f1,
        "precision": lambda weights: rates(weights)[0],
        "recall": lambda weights: rates(weights)[1],
        "yes": lambda weights: _mean(yes.astype(np.float64), weights[found.units]),
    }


def mme(found: Scored) -> Figures:
    """MME's two sums over categories of 100 x (share of questions right + share of pictures with both questions right)."""
    firsts = np.unique(found.units, return_index=True)[1]
    values = 100 * (np.bincount(found.units, found.scores) / np.bincount(found.units) + found.whole)
    names, codes = np.unique(np.array([found.groups[first] for first in firsts]), return_inverse=True)
    thinking = np.isin(names, COGNITION)

    def total(weights: np.ndarray, wanted: np.ndarray) -> float:
        return float(_means(values, codes, weights, len(names))[wanted].sum())

    return {"perception": lambda weights: total(weights, ~thinking), "cognition": lambda weights: total(weights, thinking)}


def mean_of_groups(found: Scored) -> Figures:
    """MMStar's average: the mean over its finest categories of their accuracies."""
    names, codes = np.unique(np.array(found.groups), return_inverse=True)
    return {
        "average": lambda weights: float(_means(found.scores, codes, weights[found.units], len(names)).mean()),
        **accuracy(found),
    }


def summarise(make: Callable[[Scored], Figures], seen: Scored, blind: Scored) -> dict[str, Any]:
    """Each figure with its 95 % interval and that of the blind answers, scores by group, and warnings."""
    units = int(seen.units.max(initial=-1)) + 1
    made, unseen, ones = make(seen), make(blind), np.ones(units)
    drawn = np.array([[figure(weights) for figure in made.values()] for weights in _draws(units)])
    found: dict[str, Any] = {"questions": len(seen.scores), "units": units, "figures": {}}
    for (name, figure), column in zip(made.items(), drawn.T, strict=True):
        low, high = np.quantile(column, [0.025, 0.975])
        values = {"value": figure(ones), "low": low, "high": high, "blind": unseen[name](ones)}
        found["figures"][name] = {key: round(float(value), 6) for key, value in values.items()}
    found["groups"] = _by_group(seen, blind)
    first = next(iter(found["figures"].values()))
    found["warnings"] = []
    if len(seen.scores) < FEW:
        found["warnings"].append(f"only {len(seen.scores)} questions: differences of some points are chance")
    if first["value"] <= first["blind"]:
        found["warnings"].append("not better than blind: by these questions the model makes no use of its pictures")
    return found


def _draws(units: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn when as many are drawn anew, time after time."""
    drawn = np.random.default_rng(SEED)
    for _ in range(DRAWS):
        yield np.bincount(drawn.integers(0, units, units), minlength=units).astype(np.float64)


def _by_group(seen: Scored, blind: Scored) -> dict[str, Any]:
    names, codes = np.unique(np.array(seen.groups), return_inverse=True)
    if len(names) < 2:
        return {}
    counts = np.bincount(codes)
    means = [np.bincount(codes, each.scores) / counts for each in (seen, blind)]
    rows = zip(names.tolist(), counts.tolist(), *(mean.tolist() for mean in means), strict=True)
    return {name: {"questions": count, "score": round(own, 6), "blind": round(other, 6)} for name, count, own, other in rows}


def _means(values: np.ndarray, codes: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """float64 [count]: the weighted mean of each group's values; 0 for one that no weight falls on."""
    shares = np.bincount(codes, weights, count)
    return np.bincount(codes, values * weights, count) / np.maximum(shares, 1e-12)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return _share(float((values * weights).sum()), float(weights.sum()))


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
