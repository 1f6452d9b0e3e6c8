"""Exact-match accuracy of a model's greedy answers to rows it never saw, and the blind control that keeps it honest: the
same questions, image features zeroed.
"""

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.core import prefetch
from pipeline.text import PromptBuilder
from pipeline.vlm.batches import Examples
from pipeline.vlm.evaluation.questions import Question, find_questions
from pipeline.vlm.model import VisionLanguageModel, generate


@dataclass(frozen=True, slots=True)
class Score:
    """`correct` of `questions` answered word for word."""

    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


@dataclass(frozen=True, slots=True)
class Answering:
    """How questions are put: the longest answer in tokens, prompts a pass, and whether their source shows no image."""

    max_new_tokens: int
    batch_size: int
    blind: bool = False


@torch.inference_mode()
def answer_accuracy(
    model: VisionLanguageModel, examples: Examples, accelerator: Accelerator, builder: PromptBuilder, asking: Answering
) -> tuple[Score, list[str]]:
    """Greedy answers to every supervised turn, compared as text with the row's own; returns the score and all answers.

    A turn is asked behind the row's own turns before it. Questions with the same prompt and the same images have the same answer,
    so each is generated once. Zeroed images are all the same image, which is why the blind control takes a fraction of the time.
    """
    model.eval()
    rows = find_questions(examples.table)
    same = _same_prompts(rows, None if asking.blind else examples.table.image_hashes())
    same.sort(key=lambda group: -len(rows[group[0]].prompt))  # like lengths together: little padding
    parts = [same[start : start + asking.batch_size] for start in range(0, len(same), asking.batch_size)]
    mine = _answer(
        model, examples, accelerator, builder, asking, rows, parts[accelerator.process_index :: accelerator.num_processes]
    )
    everyone = gather_object([mine]) if accelerator.num_processes > 1 else [mine]
    found = {number: text for part in everyone for number, text in part.items()}
    given = [found[number] for number in range(len(rows))]
    expected = [builder.decode(row.reference) for row in rows]
    return Score(sum(a.strip() == e.strip() for a, e in zip(given, expected, strict=True)), len(rows)), given


def _answer(
    model: VisionLanguageModel,
    examples: Examples,
    accelerator: Accelerator,
    builder: PromptBuilder,
    asking: Answering,
    rows: list[Question],
    parts: list[list[list[int]]],
) -> dict[int, str]:
    """The answer of every row in `parts`, which are groups of rows that have the same one."""
    source = examples.source
    answers: dict[int, str] = {}

    def load(part: list[list[int]]) -> Any:
        return source.load(np.concatenate([np.array(rows[group[0]].slots, np.int64) for group in part]))

    name, hidden = "answers, blind" if asking.blind else "answers", not accelerator.is_main_process
    with closing(prefetch(parts, load)) as loaded:
        bar = tqdm(source.stream(loaded), total=len(parts), desc=name, unit="batch", mininterval=0.5, disable=hidden)
        for part, features in bar:
            firsts = [rows[group[0]] for group in part]
            with accelerator.autocast():
                produced = generate(
                    model,
                    builder,
                    [row.prompt for row in firsts],
                    [row.image_start for row in firsts],
                    features,
                    max_new_tokens=asking.max_new_tokens,
                    device=accelerator.device,
                )
            for group, ids in zip(part, produced, strict=True):
                answers |= dict.fromkeys(group, builder.decode(ids))
    return answers


def _same_prompts(asked: list[Question], hashes: np.ndarray | None) -> list[list[int]]:
    """Numbers of questions, grouped by equal prompt and equal images (`hashes` None: images do not tell them apart)."""
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for number, question in enumerate(asked):
        shown = question.slots
        images = b"" if hashes is None else hashes[shown.start : shown.stop].tobytes()
        groups.setdefault((question.prompt.tobytes(), images), []).append(number)
    return list(groups.values())
