"""What a trained model is worth on held-out rows: every answer to results/<stage>/predictions.parquet, and the figures of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import publish, writing
from pipeline.core.trees import is_first_of_tree
from pipeline.features import NoFeatures
from pipeline.vlm.evaluation import Answering, answer_accuracy, find_questions, make_table, summarise, write_table
from pipeline.vlm.model import VisionLanguageModel
from pipeline.vlm.training.assembly import TrainingRun


def measure_answers(run: TrainingRun, model: VisionLanguageModel, likelihoods: list[np.ndarray]) -> dict[str, Any]:
    """Accuracy over every supervised turn with its 95 % interval, and that of the blind control.

    The first process of each work tree writes the answers and `scores.json`, which has the same by question type and turn.

    Args:
        likelihoods: of each supervised token of each held-out row (see `log_likelihoods`).
    """
    heldout, params = run.heldout, run.params
    asking = Answering(params.evaluate.max_new_tokens, params.runtime.eval_batch)
    unseen = replace(heldout, source=NoFeatures(heldout.source))
    score, answers = answer_accuracy(model, heldout, run.accelerator, run.builder, asking)
    blind_score, blind = answer_accuracy(model, unseen, run.accelerator, run.builder, replace(asking, blind=True))
    figures = {"questions": score.questions, "accuracy": round(score.accuracy, 6), "accuracy_blind": round(blind_score.accuracy, 6)}
    if not is_first_of_tree():
        return figures
    questions, results = find_questions(heldout.table), Path("results") / run.name
    spans = [(likelihoods[question.row], len(question.reference)) for question in questions]
    firsts = _firsts([(question.row, size) for question, (_, size) in zip(questions, spans, strict=True)])
    each = [values[first : first + size] for first, (values, size) in zip(firsts, spans, strict=True)]
    table = make_table(heldout.table, questions, run.builder, answers=answers, blind=blind, log_likelihood=each)
    write_table(results / "predictions.parquet", table)
    found = summarise(table)
    with publish(results / "scores.json") as temporary, writing(results / "scores.json"):
        temporary.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _tell(run.name, found)
    exact = found["metrics"].get("exact", {})
    return figures | {f"accuracy_{end}": exact[end] for end in ("low", "high") if end in exact}


def _firsts(sizes: list[tuple[int, int]]) -> list[int]:
    """Where each question's tokens begin among the supervised tokens of its row."""
    firsts, row, done = [], -1, 0
    for number, size in sizes:
        done = done if number == row else 0
        firsts.append(done)
        row, done = number, done + size
    return firsts


def _tell(name: str, found: dict[str, Any]) -> None:
    """One line of the metrics that fit, one for each warning."""
    shown = [
        f"{metric} {value['mean']:.2%} ({value['low']:.2%} to {value['high']:.2%})" for metric, value in found["metrics"].items()
    ]
    print(f"{name}: held-out answers, 95 % intervals: {', '.join(shown)}; blind {found['blind']['mean']:.2%}", flush=True)
    for warning in found["warnings"]:
        print(f"{name}: warning: {warning}", flush=True)
