"""The metrics: values worked out by hand, plain forms of the same, and the field's own packages where they are installed.

rouge-score, pycocoevalcap, rapidfuzz, anls and scikit-learn are no dependency: `pip install` them to compare.
"""

import math

import numpy as np
import pytest

from pipeline.vlm.evaluation.corpus import Cider, YesNo
from pipeline.vlm.evaluation.metrics import METRICS, normalise, score, words

DEFINED = [
    ("exact", " Red. ", "Red.", 1.0), ("exact", "red.", "Red.", 0.0),
    ("vqa", "A red circle", "red circle.", 1.0), ("vqa", "two", "2", 1.0), ("vqa", "1,000.5", "1000.5", 1.0),
    ("vqa", "t-shirt", "t shirt", 1.0), ("vqa", "green", "red", 0.0),
    ("contains", "The color of the triangle is red.", "Red.", 1.0), ("contains", "It is reddish.", "Red", 0.0),
    ("contains", "Anything", "", 0.0), ("contains", "circle red", "red circle", 0.0), ("contains", "一个红色的圆", "红色", 1.0),
    ("token_f1", "a big red dog", "red dog runs", 2 / 3), ("token_f1", "", "", 1.0), ("token_f1", "x", "", 0.0),
    ("token_f1", "红色", "红圆", 0.5),
    ("anls", "kitten", "sitting", 1 - 3 / 7), ("anls", "Paris ", "paris", 1.0), ("anls", "rome", "berlin", 0.0),
    ("anls", "", "", 1.0), ("anls", "", "x", 0.0), ("anls", "abcd", "ab", 0.5), ("anls", "abcde", "ab", 0.0),
    ("rouge_l", "police kill the gunman", "police killed the gunman", 0.75),
    ("rouge_l", "the gunman kill police", "police killed the gunman", 0.5),
    ("rouge_l", "", "x", 0.0), ("rouge_l", "一个红色的圆。", "红色的圆", 8 / 10), ("rouge_l", "Café", "café", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("metric", "answer", "reference", "value"), DEFINED)
def test_a_metric_is_what_its_definition_says(metric: str, answer: str, reference: str, value: float) -> None:
    assert METRICS[metric](answer, reference) == pytest.approx(value)


def pairs(seed: int, vocabulary: list[str], longest: int = 14) -> list[tuple[str, str]]:
    """200 answers and references that share some of their words."""
    drawn, made = np.random.default_rng(seed), []
    for _ in range(200):
        reference = drawn.choice(vocabulary, drawn.integers(1, longest)).tolist()
        answer = [word for word in reference if drawn.random() < 0.7] + drawn.choice(vocabulary, drawn.integers(0, 4)).tolist()
        made.append((" ".join(answer), " ".join(reference)))
    return made


MIXED = ["red", "a", "Circle.", "two", "is", "the", "1,000", "blue,", "left-hand", "dog"]
PLAIN = ["a", "red", "circle", "two", "dogs", "run", "on", "the", "green", "grass", "near", "water"]
LETTERS = list("abcab ")


def test_metrics_agree_with_plain_forms_of_themselves() -> None:
    for one, other in pairs(0, MIXED, longest=7):
        given, wanted = normalise(one).split(), normalise(other).split()
        windows = [given[at : at + len(wanted)] for at in range(len(given) - len(wanted) + 1)]
        assert METRICS["contains"](one, other) == float(bool(wanted) and wanted in windows)
        assert METRICS["vqa"](one, other) >= METRICS["exact"](one, other)
        assert all(0 <= metric(one, other) <= 1 for metric in METRICS.values())
        assert METRICS["anls"](one, other) == pytest.approx(plain_anls(one, other))
        assert METRICS["rouge_l"](one, other) == pytest.approx(plain_rouge(words(one), words(other)))


def plain_anls(one: str, other: str) -> float:
    one, other = one.lower().strip(), other.lower().strip()
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
    for i in range(1, len(one) + 1):
        for j in range(1, len(other) + 1):
            swap = table[i - 1, j - 1] + (one[i - 1] != other[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, swap)
    similar = 1 - table[-1, -1] / max(len(one), len(other))
    return float(similar) if similar >= 0.5 else 0.0


def plain_rouge(one: list[str], other: list[str]) -> float:
    table = np.zeros((len(one) + 1, len(other) + 1), int)
    for i, word in enumerate(one, 1):
        for j, against in enumerate(other, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if word == against else max(table[i - 1, j], table[i, j - 1])
    return float(2 * table[-1, -1] / (len(one) + len(other)))


def test_pairs_are_scored_in_their_order() -> None:
    found = score(METRICS["exact"], ["a", "b", "a", "c"], ["a", "a", "a", "c"])
    assert found.tolist() == [1, 0, 1, 1]


def test_cider_is_ten_for_the_reference_itself_and_nothing_for_what_all_say() -> None:
    references = ["a red circle on grass", "a blue square on sand", "a green dog in water"]
    cider = Cider([text] for text in references)
    assert cider(references[0], [references[0]]) == pytest.approx(10)
    assert cider("a a a a", [references[0]]) == 0, "every reference has it"
    assert cider("", [references[0]]) == 0
    # by hand: "red" and "blue" are rare alike, so one word of one: cosine of single words 1/sqrt(1 + 1 + ...) as below
    rare, half = math.log(3), math.log(3 / 2)  # in one reference of three; "on" is in two
    length = math.sqrt(3 * rare**2 + half**2)  # red, circle, grass, on
    expected = 10 / 4 * math.exp(-(4**2) / (2 * 36)) * rare**2 / (rare * length)
    assert cider("red", [references[0]]) == pytest.approx(expected)
    assert cider("red", [references[0], references[1]]) == pytest.approx(expected / 2)


def test_yes_and_no_are_counted_as_pope_counts_them() -> None:
    answers = ["Yes.", "no", "Yes, there is.", "Maybe.", "No.", "red"]
    references = ["Yes.", "Yes.", "No.", "No.", "No.", "Red."]
    found = YesNo.of(answers[:3], references[:3]) + YesNo.of(answers[3:], references[3:])
    figures = found.figures()
    assert figures["questions"] == 5, "a reference that is neither is not asked"
    assert figures["accuracy"] == 0.4
    assert (figures["precision"], figures["recall"], figures["f1"]) == (0.5, 0.5, 0.5)
    assert (figures["yes_share"], figures["yes_share_reference"]) == (0.4, 0.4)
    assert figures["f1_low"] <= figures["f1"] <= figures["f1_high"]
    assert YesNo.of(["Yes."], ["Red."]).figures() == {"questions": 0}
    assert YesNo.of(["No."] * 4, ["Yes."] * 4).figures()["f1"] == 0


# The field's own packages, 200 rows each


def test_rouge_l_equals_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for answer, reference in pairs(1, MIXED):
        assert METRICS["rouge_l"](answer, reference) == pytest.approx(scorer.score(reference, answer)["rougeL"].fmeasure)


def test_cider_equals_pycocoevalcap() -> None:
    peer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    rows = pairs(2, PLAIN)
    others = [reference for _, reference in pairs(3, PLAIN)]
    documents = [[reference, other] for (_, reference), other in zip(rows, others, strict=True)]
    mean, each = peer.compute_score(dict(enumerate(documents)), {number: [answer] for number, (answer, _) in enumerate(rows)})
    cider = Cider(documents)
    mine = [cider(answer, references) for (answer, _), references in zip(rows, documents, strict=True)]
    assert mine == pytest.approx(list(each), rel=1e-9, abs=1e-12)
    assert np.mean(mine) == pytest.approx(mean)
    assert max(mine) > 1


def test_edit_distance_equals_rapidfuzz() -> None:
    similarity = pytest.importorskip("rapidfuzz.distance.Levenshtein").normalized_similarity
    for one, other in pairs(4, LETTERS, longest=90):
        one, other = (" ".join(text.split()) for text in (one, other))
        expected = similarity(one, other)
        assert METRICS["anls"](one, other) == pytest.approx(expected if expected >= 0.5 else 0)


def test_anls_equals_the_package_of_that_name() -> None:
    anls_score = pytest.importorskip("anls").anls_score
    for answer, reference in pairs(5, PLAIN, longest=5):
        mine = METRICS["anls"](answer, reference)
        if mine != 0.5:  # which counts in the benchmark's own code, and not in the paper that the package follows
            assert mine == pytest.approx(anls_score(answer, [reference], threshold=0.5))


def test_f1_of_yes_equals_scikit_learn() -> None:
    peer = pytest.importorskip("sklearn.metrics").precision_recall_fscore_support
    drawn = np.random.default_rng(6)
    answers, references = (np.where(drawn.random(200) < share, "yes", "no").tolist() for share in (0.6, 0.4))
    figures = YesNo.of(answers, references).figures()
    found = peer(references, answers, pos_label="yes", average="binary")[:3]
    assert [figures[name] for name in ("precision", "recall", "f1")] == pytest.approx(list(found), abs=1e-6)
