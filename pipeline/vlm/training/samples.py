"""The same few held-out pictures asked again as a run goes on: how its answers come to be."""

from collections.abc import Callable
from typing import Any

from pipeline.vlm.evaluation import Answering, Question, answer_questions, describe, find_questions
from pipeline.vlm.model import VisionLanguageModel, gathered
from pipeline.vlm.training.assembly import TrainingRun

PICTURES = 8


def sample_questions(run: TrainingRun) -> list[Question]:
    """The first of each of eight held-out rows about different pictures, always the same."""
    table = run.heldout.table
    return [question for question in find_questions(table, table.spread(PICTURES)) if question.turn == 0]


def sample_answers(run: TrainingRun, questions: list[Question]) -> Callable[[VisionLanguageModel], list[str]]:
    """What asks a model that goes on training afterwards. All processes answer, and have the same."""
    evaluate, runtime = run.params.evaluate, run.params.runtime
    asking = Answering(evaluate.max_new_tokens, runtime.eval_batch, run.training.micro_tokens, alike=True)

    def answer(model: VisionLanguageModel) -> list[str]:
        with gathered(model):
            return answer_questions(model, run.heldout, run.accelerator, run.builder, asking, questions)

    return answer


def tell_questions(run: TrainingRun, questions: list[Question]) -> list[dict[str, Any]]:
    """What is asked, for whoever reads the answers."""
    columns = describe(run.heldout.table, questions, run.builder)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
