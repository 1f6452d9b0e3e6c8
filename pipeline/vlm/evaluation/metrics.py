"""How an answer is compared with its reference, each a number from 0 to 1, as the benchmarks that use it define it."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_POINT = re.compile(r"(?<!\d)\.|\.(?!\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = str.maketrans(dict.fromkeys(set(string.punctuation) - {"'", ".", ":", ","}, " ") | {",": " "})


def normalise(text: str) -> str:
    """As the VQA benchmark compares (Antol et al. 2015): lower case, numbers as digits, no articles, no punctuation.

    A point or comma within a number stays a part of it: 1,000.5 is 1000.5.
    """
    text = _COMMA.sub("", text.lower().replace("\n", " "))
    text = _POINT.sub("", text.translate(_PUNCTUATION))
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(word for word in words if word not in _ARTICLES)


def exact(answer: str, reference: str) -> float:
    """Equal word for word, blanks at the ends aside."""
    return float(answer.strip() == reference.strip())


def vqa(answer: str, reference: str) -> float:
    """Equal after `normalise`: "A red circle." is "red circle"."""
    return float(normalise(answer) == normalise(reference))


def contains(answer: str, reference: str) -> float:
    """The reference's words stand in the answer, in their order and side by side: "The shape is red." contains "Red."."""
    wanted = normalise(reference)
    return float(bool(wanted) and f" {wanted} " in f" {normalise(answer)} ")


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall of words, as SQuAD counts them (Rajpurkar et al. 2016)."""
    given, wanted = normalise(answer).split(), normalise(reference).split()
    if not given or not wanted:
        return float(given == wanted)
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted))


def anls(answer: str, reference: str) -> float:
    """Normalised Levenshtein similarity, 0 below one half (Biten et al. 2019): TextVQA, DocVQA."""
    one, other = " ".join(answer.lower().split()), " ".join(reference.lower().split())
    longest = max(len(one), len(other))
    similarity = 1 - _distance(one, other) / longest if longest else 1.0
    return similarity if similarity >= 0.5 else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), lower case, letters and digits only."""
    given, wanted = (re.findall(r"[a-z0-9]+", text.lower()) for text in (answer, reference))
    if not given or not wanted:
        return 0.0
    common = _common(given, wanted)
    return 2 * common / (len(given) + len(wanted)) if common else 0.0


# Kept of every answer; `headline` says which of them are told.
METRICS: dict[str, Callable[[str, str], float]] = {
    "exact": exact,
    "vqa": vqa,
    "contains": contains,
    "token_f1": token_f1,
    "anls": anls,
    "rouge_l": rouge_l,
}


def headline(references: Sequence[str]) -> list[str]:
    """The metrics that fit, by the median length of the references in words: short answers, phrases, sentences."""
    lengths = sorted(len(text.split()) for text in references)
    median = lengths[len(lengths) // 2] if lengths else 0
    if median <= 3:
        return ["exact", "vqa", "contains"]
    return ["exact", "token_f1", "anls"] if median <= 8 else ["token_f1", "rouge_l"]


def _distance(one: str, other: str) -> int:
    """Levenshtein's, a row of the table at a time."""
    before = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        row = [number]
        for place, against in enumerate(other, 1):
            row.append(min(row[-1] + 1, before[place] + 1, before[place - 1] + (letter != against)))
        before = row
    return before[-1]


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, against in enumerate(other, 1):
            row.append(before[place - 1] + 1 if word == against else max(row[-1], before[place]))
        before = row
    return before[-1]
