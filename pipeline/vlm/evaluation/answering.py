"""A model's greedy answers to rows it never saw, and to the same with image features zeroed: the blind control."""

import hashlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.core import prefetch
from pipeline.text import PromptBuilder
from pipeline.vlm.batches import Examples
from pipeline.vlm.evaluation.questions import Question
from pipeline.vlm.model import VisionLanguageModel, generate

KNOWN = 100_000  # answers remembered


@dataclass(frozen=True, slots=True)
class Answering:
    """How questions are put.

    Attributes:
        max_new_tokens: of an answer, at most.
        batch_size, tokens: prompts a pass, and what they and their answers may have together, padding included.
        blind: whether their source shows no image.
        alike: each process answers all, since one with a part of every weight cannot do so alone.
    """

    max_new_tokens: int
    batch_size: int
    tokens: int
    blind: bool = False
    alike: bool = False


def answer_questions(
    model: VisionLanguageModel,
    examples: Examples,
    accelerator: Accelerator,
    builder: PromptBuilder,
    asking: Answering,
    questions: Sequence[Question],
    known: dict[bytes, str] | None = None,
) -> list[str]:
    """Greedy answers to questions about the table of `examples`, in their order, blanks at their ends taken off. All processes
    take part and get all of them.

    Questions with the same prompt and the same images have the same answer, so each is generated once. Zeroed images are all
    the same image, which is why the blind control takes a fraction of the time. `known` has answers from one call to the next.
    """
    model.eval()
    known = {} if known is None else known
    keys = _keys(questions, None if asking.blind else examples.table.image_hashes())
    firsts: dict[bytes, Question] = {}
    for key, question in zip(keys, questions, strict=True):
        if key not in known:
            firsts.setdefault(key, question)
    order = sorted(firsts, key=lambda key: -len(firsts[key].prompt))  # like lengths together: little padding
    parts = _batches([firsts[key] for key in order], asking)
    rank, ranks = (0, 1) if asking.alike else (accelerator.process_index, accelerator.num_processes)
    mine = _answer(model, examples, accelerator, builder, asking, parts[rank::ranks])
    everyone = gather_object([mine]) if ranks > 1 else [mine]
    produced: list[list[str]] = [[]] * len(parts)
    for number, texts in enumerate(everyone):
        produced[number::ranks] = texts
    found = dict(zip(order, chain.from_iterable(produced), strict=True))
    answers = [found[key] if key in found else known[key] for key in keys]
    known |= found
    for key in list(known)[:-KNOWN]:
        del known[key]
    return answers


def _keys(questions: Sequence[Question], hashes: np.ndarray | None) -> list[bytes]:
    """Equal for questions with the same prompt and the same images (`hashes` None: images do not tell them apart)."""
    found = []
    for question in questions:
        key = hashlib.blake2b(question.prompt.tobytes(), digest_size=16)
        if hashes is not None:
            key.update(b"images" + hashes[question.slots.start : question.slots.stop].tobytes())
        found.append(key.digest())
    return found


def _batches(questions: Sequence[Question], asking: Answering) -> list[Sequence[Question]]:
    """Questions, the longest first, cut into as many as one pass takes."""
    parts, start = [], 0
    while start < len(questions):
        count = max(1, min(asking.batch_size, asking.tokens // (len(questions[start].prompt) + asking.max_new_tokens)))
        parts.append(questions[start : start + count])
        start += count
    return parts


def _answer(
    model: VisionLanguageModel,
    examples: Examples,
    accelerator: Accelerator,
    builder: PromptBuilder,
    asking: Answering,
    parts: list[Sequence[Question]],
) -> list[list[str]]:
    """The answers to each part."""
    source = examples.source
    answers: list[list[str]] = []

    def load(part: Sequence[Question]) -> Any:
        return source.load(np.concatenate([np.array(question.slots, np.int64) for question in part]))

    name, hidden = "answers, blind" if asking.blind else "answers", not accelerator.is_main_process
    with closing(prefetch(parts, load)) as loaded:
        bar = tqdm(source.stream(loaded), total=len(parts), desc=name, unit="batch", mininterval=0.5, disable=hidden)
        for part, features in bar:
            with accelerator.autocast():
                produced = generate(
                    model,
                    builder,
                    [question.prompt for question in part],
                    [question.image_start for question in part],
                    features,
                    max_new_tokens=asking.max_new_tokens,
                    device=accelerator.device,
                )
            answers.append([builder.decode(ids).strip() for ids in produced])
    return answers
