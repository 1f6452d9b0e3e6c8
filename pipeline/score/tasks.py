"""The benchmarks, an entry each: which files and columns of a local copy are read, what is asked, and what an answer is worth.

Prompts and metrics are those of lmms-eval 0.7.3 (its `default` prompts), columns those of the data sets' copies on the hub that it
reads. To add one, write a function from a row to its `Question` and an entry of `TASKS`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from pipeline.score import answers, figures
from pipeline.score.figures import Figures, Scored

Content = dict[str, Any]
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
COMPLAINT = " Please answer yes or no."  # stands in MME's questions, and gives way to the prompt


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked about a row's picture.

    Attributes:
        text: all words of the prompt.
        reference: the answer that predictions are shown and weighed with; `references`: all, where there are several.
        options: letter -> words of a multiple choice.
        group: what it is counted under beside the whole; `unit`: rows of one unit are right or wrong together.
        picture: the id of its picture in the task's own file of pictures.
    """

    text: str
    reference: str
    references: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    group: str = ""
    unit: str = ""
    picture: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark.

    Attributes:
        split, config: which part of its copy is read: files of `split-...` or in a folder `split`, within a folder `config`.
        columns: read beside the picture's, `image`.
        question: a row -> what is asked; None = the row is no question of this task.
        score: an answer and its question -> 0 to 1.
        figures: what the scores of all questions come to.
        pictures: the folder of pictures where they are files of their own, found by `Question.picture`.
        answers: what a reference may be; none = anything, or the letters of the options.
        tokens: the longest answer. Where lmms-eval allows more, a longer one could not be right either.
    """

    split: str
    columns: tuple[str, ...]
    question: Callable[[Content], Question | None]
    score: Callable[[str, Question], float]
    figures: Callable[[Scored], Figures] = figures.accuracy
    config: str = ""
    pictures: str = ""
    answers: tuple[str, ...] = ()
    tokens: int = 16

    def check(self, question: Question) -> None:
        """Raises ValueError for a reference that no answer could equal."""
        allowed = self.answers or tuple(question.options)
        if allowed and question.reference.strip().lower() not in map(str.lower, allowed):
            raise ValueError(f"its answer is {question.reference!r:.40}, expected {', '.join(allowed)}")


def _listed(options: Iterable[str]) -> dict[str, str]:
    return dict(zip(ascii_uppercase, options, strict=False))


def _written(options: Mapping[str, str]) -> str:
    return "\n".join(f"{letter}. {words}" for letter, words in options.items())


def _letter(options: Mapping[str, str], number: int) -> str:
    if not 0 <= number < len(options):
        raise ValueError(f"the answer is option {number} of {len(options)}, counted from 0")
    return ascii_uppercase[number]


def _vqav2(row: Content) -> Question:
    people = tuple(person["answer"] for person in row["answers"] or ())
    usual = row["multiple_choice_answer"] or _most_common(people)
    return Question(row["question"] + SHORT, usual, people, group=row["answer_type"] or "")


def _textvqa(row: Content) -> Question:
    people = tuple(row["answers"] or ())
    return Question(row["question"].capitalize() + SHORT, _most_common(people), people)


def _most_common(people: tuple[str, ...]) -> str:
    return Counter(answer for answer in people if answer.strip()).most_common(1)[0][0] if any(map(str.strip, people)) else ""


def _gqa(row: Content) -> Question:
    return Question(row["question"] + SHORT, row["answer"], picture=row["imageId"])


def _scienceqa(row: Content) -> Question | None:
    if row["image"] is None:  # of the whole benchmark, half the questions have no picture
        return None
    options = _listed(row["choices"])
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    text = f"{context}{row['question']}\n{_written(options)}{LETTER}"
    return Question(text, _letter(options, row["answer"]), options=options, group=row["subject"] or "")


def _pope(row: Content) -> Question:
    return Question(row["question"].strip() + SHORT, row["answer"].strip(), group=row["category"] or "")


def _mme(row: Content) -> Question:
    text = row["question"].strip().replace(COMPLAINT, "") + SHORT
    return Question(text, row["answer"].strip().rstrip("."), group=row["category"], unit=f"{row['category']}/{row['question_id']}")


def _mmstar(row: Content) -> Question:
    text = row["question"].strip().replace(COMPLAINT, "") + LETTER.rstrip(".")
    return Question(text, row["answer"], group=f"{row['category']}/{row['l2_category']}")


def _mmbench(row: Content) -> Question:
    options = {letter: str(row[letter]) for letter in "ABCD" if row[letter] not in (None, "", "nan")}
    hint = f"{row['hint']} " if row["hint"] not in (None, "", "nan") else ""
    text = f"{hint}{row['question']} There are several options:\n{_written(options)}\n{LETTER}"
    return Question(text, row["answer"], options=options, group=row["category"], unit=str(int(row["index"]) % 1_000_000))


def _ai2d(row: Content) -> Question:
    options = _listed(row["options"])
    return Question(f"{row['question']}\n{_written(options)}{LETTER}", _letter(options, int(row["answer"])), options=options)


def _chartqa(row: Content) -> Question:
    return Question(row["question"] + "\nAnswer the question with a single word.", row["answer"], group=row["type"])


def _seed(row: Content) -> Question | None:
    if row["data_type"] != "image":  # a video is several pictures of one
        return None
    options = {letter: row[f"choice_{letter.lower()}"] for letter in "ABCD"}
    return Question(f"{row['question']}\n{_written(options)}{LETTER}", row["answer"], options=options)


def _soft(words: Callable[[str], str]) -> Callable[[str, Question], float]:
    return lambda answer, asked: answers.soft_accuracy(words(answer), [words(reference) for reference in asked.references])


def _plain(score: Callable[[str, str], float]) -> Callable[[str, Question], float]:
    return lambda answer, asked: score(answer, asked.reference)


TASKS: dict[str, Task] = {
    "vqav2": Task(
        "validation",
        ("question", "answers", "multiple_choice_answer", "answer_type"),
        _vqav2,
        _soft(answers.vqa_words),
    ),
    "gqa": Task(
        "testdev",
        ("question", "answer", "imageId"),
        _gqa,
        _plain(answers.same_text),
        config="testdev_balanced_instructions",
        pictures="testdev_balanced_images",
    ),
    "textvqa": Task("validation", ("question", "answers"), _textvqa, _soft(answers.textvqa_words)),
    "scienceqa": Task(
        "test",
        ("question", "choices", "answer", "hint", "subject"),
        _scienceqa,
        _plain(answers.letter_or_option),
        config="ScienceQA-IMG",
    ),
    "pope": Task(
        "test",
        ("question", "answer", "category"),
        _pope,
        _plain(lambda answer, reference: float(answer.lower().strip() == reference.lower())),
        figures.yes_no,
        answers=("yes", "no"),
    ),
    "mme": Task(
        "test",
        ("question", "answer", "category", "question_id"),
        _mme,
        _plain(lambda answer, reference: float(answers.yes_or_no(answer) == reference.lower())),
        figures.mme,
        answers=("yes", "no"),
    ),
    "mmstar": Task(
        "val",
        ("question", "answer", "category", "l2_category"),
        _mmstar,
        _plain(lambda answer, reference: float(answers.pick_letter(answer, "ABCD") == reference.strip().upper())),
        figures.mean_of_groups,
        answers=tuple("ABCD"),
        tokens=64,
    ),
    "mmbench": Task(
        "dev",
        ("index", "question", "hint", "A", "B", "C", "D", "answer", "category"),
        _mmbench,
        lambda answer, asked: float(answers.infer_option(answer, asked.options) == asked.reference),
        figures.units_right,
        config="en",
        tokens=64,
    ),
    "ai2d": Task("test", ("question", "options", "answer"), _ai2d, _plain(answers.led_by_letter)),
    "chartqa": Task("test", ("question", "answer", "type"), _chartqa, _plain(answers.relaxed)),
    "seed": Task(
        "test",
        ("question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_type"),
        _seed,
        _plain(answers.first_letter),
    ),
}
