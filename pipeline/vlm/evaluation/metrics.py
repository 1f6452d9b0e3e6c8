"""How an answer is compared with its reference, as the benchmarks that use it define it.

Each metric is a function of two texts that gives a number from 0 to 1. What needs more than one pair of texts is elsewhere:
`corpus` has CIDEr and yes/no figures, `choices` multiple choice by likelihood.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = str.maketrans(dict.fromkeys(set(string.punctuation) - {"'", ".", ":", ","}, " ") | {",": " "})
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_ALONE = re.compile(f"([{_UNSPACED}])")
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def normalise(text: str) -> str:
    """As the VQA benchmark compares (Antol et al. 2015): lower case, numbers as digits, no articles, no punctuation.

    A point or comma within a number stays a part of it: 1,000.5 is 1000.5.
    """
    text = _COMMA.sub("", text.lower().replace("\n", " "))
    text = _POINT.sub("", text.translate(_PUNCTUATION))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def words(text: str) -> list[str]:
    """Runs of letters and digits in lower case; where a script writes no blanks (Chinese, Japanese, Thai) each letter is one."""
    return _WORD.findall(text.lower())


def exact(answer: str, reference: str) -> float:
    """Equal word for word, blanks at the ends aside."""
    return float(answer.strip() == reference.strip())


def vqa(answer: str, reference: str) -> float:
    """Equal after `normalise`: "A red circle." is "red circle"."""
    return float(normalise(answer) == normalise(reference))


def contains(answer: str, reference: str) -> float:
    """The reference's words stand in the answer, in their order and side by side: "The shape is red." contains "Red."."""
    wanted = _spaced(reference)
    return float(bool(wanted) and f" {wanted} " in f" {_spaced(answer)} ")


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD counts them (Rajpurkar et al. 2016)."""
    given, wanted = _spaced(answer).split(), _spaced(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, 0 below one half (Biten et al. 2019; the half itself counts as in its code)."""
    one, other = " ".join(answer.lower().split()), " ".join(reference.lower().split())
    longest = max(len(one), len(other))
    if one == other:
        return 1.0
    if 2 * min(len(one), len(other)) < longest:
        return 0.0
    similarity = 1 - _distance(one, other) / longest
    return similarity if similarity >= 0.5 else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower case, letters and digits only."""
    given, wanted = words(answer), words(reference)
    common = _common(given, wanted) if given and wanted else 0
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


# Kept of every answer; `evaluate.metrics` says which of them are told.
METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "vqa": vqa,
    "contains": contains,
    "token_f1": token_f1,
    "anls": anls,
    "rouge_l": rouge_l,
}


def score(metric: Callable[[str, str], float], answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """float32 [N]: `metric` of each pair. Equal pairs, of which short answers have many, are compared once."""
    pairs = list(zip(answers, references, strict=True))
    found = {pair: metric(*pair) for pair in set(pairs)}
    return np.fromiter((found[pair] for pair in pairs), np.float32, len(pairs))


def _spaced(text: str) -> str:
    return " ".join(_ALONE.sub(r" \1 ", normalise(text)).split())


def _places(items: Sequence[Hashable]) -> dict[Hashable, int]:
    """Of each item a whole number whose bits say where it stands."""
    found: dict[Hashable, int] = {}
    for place, item in enumerate(items):
        found[item] = found.get(item, 0) | 1 << place
    return found


def _distance(one: str, other: str) -> int:
    """Levenshtein's, of texts that are not empty. A column of the table is two whole numbers, so that a letter costs some
    operations on them whatever the length (Myers 1999, as Hyyrö 2001 puts it).
    """
    places, last, every = _places(one), 1 << (len(one) - 1), (1 << len(one)) - 1
    more, less, distance = every, 0, len(one)
    for letter in other:
        same = places.get(letter, 0)
        diagonal = (((same & more) + more) ^ more) | same | less
        up, down = less | ~(diagonal | more), more & diagonal
        distance += bool(up & last) - bool(down & last)
        up = up << 1 | 1
        more, less = (down << 1 | ~(diagonal | up)) & every, up & diagonal & every
    return distance


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, a column of the table as the bits of one number (Hyyrö 2004)."""
    places, every = _places(one), (1 << len(one)) - 1
    column = every
    for word in other:
        same = column & places.get(word, 0)
        column = (column + same | column - same) & every
    return len(one) - column.bit_count()
