"""What a trained model is worth on held-out rows: every answer to results/<stage>/predictions.parquet, and the figures of it.

Rows are looked at a window at a time: asked, answered, compared and written, so that memory does not grow with the set.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.core import write_json
from pipeline.core.trees import is_first_of_tree
from pipeline.features import NoFeatures
from pipeline.vlm.evaluation import (
    Answering,
    Cider,
    answer_questions,
    choose,
    choose_metrics,
    describe,
    find_options,
    find_questions,
    make_table,
    references_of,
    row_windows,
    source_names,
    summarise,
    writing_tables,
)
from pipeline.vlm.model import VisionLanguageModel
from pipeline.vlm.training.assembly import TrainingRun

LOOKED_AT = 1000  # rows by which `evaluate.metrics: auto` chooses, spread evenly


@torch.inference_mode()
def measure_answers(run: TrainingRun, model: VisionLanguageModel, likelihoods: np.ndarray) -> dict[str, Any]:
    """Accuracy over every supervised turn with its 95 % interval, and that of the blind control.

    The first process of each work tree writes the answers and `scores.json`, which has all other figures; all others return
    nothing.

    Args:
        likelihoods: of each supervised token of the held-out rows (see `log_likelihoods`).
    """
    results = Path("results") / run.name
    chosen, why = choose_metrics(run.params.evaluate.metrics, *_said(run, _looked_at(len(run.heldout.table))))
    writes = is_first_of_tree()
    with writing_tables(results / "predictions.parquet") if writes else nullcontext() as write:
        for table in _tables(run, model, likelihoods, chosen):
            if write is not None:
                write(table)
    if not writes:
        return {}
    found = summarise(results / "predictions.parquet", chosen, why)
    write_json(results / "scores.json", found)
    _tell(run.name, found)
    exact, blind = found["exact"], found["blind"]
    figures = {"questions": found["questions"], "accuracy": exact["mean"], "accuracy_blind": blind["mean"]}
    return figures | {f"accuracy_{end}": exact[end] for end in ("low", "high")}


def _looked_at(rows: int) -> np.ndarray:
    return np.unique(np.linspace(0, rows - 1, min(rows, LOOKED_AT)).astype(np.int64))


def _said(run: TrainingRun, rows: np.ndarray) -> tuple[list[str], list[str]]:
    """Questions and references of these rows."""
    found = describe(run.heldout.table, find_questions(run.heldout.table, rows), run.builder)
    return found["question"], found["reference"]


def _tables(run: TrainingRun, model: VisionLanguageModel, likelihoods: np.ndarray, chosen: list[str]) -> Iterator[pa.Table]:
    """The rows of predictions.parquet, a window at a time. All processes take part in answering."""
    heldout, accelerator, builder = run.heldout, run.accelerator, run.builder
    asking = Answering(run.params.evaluate.max_new_tokens, run.params.runtime.eval_batch, run.training.micro_tokens)
    unseen, known = replace(heldout, source=NoFeatures(heldout.source)), dict[bytes, str]()
    of_source = source_names(run.params.data.heldout)
    cider = Cider([text] for text in _every_reference(run)) if "cider" in chosen else None
    first = 0
    for rows in row_windows(len(heldout.table)):
        questions = find_questions(heldout.table, rows)
        answers = answer_questions(model, heldout, accelerator, builder, asking, questions)
        blind = answer_questions(model, unseen, accelerator, builder, replace(asking, blind=True), questions, known)
        columns = describe(heldout.table, questions, builder) | {"answer": answers, "blind": blind}
        columns["source"] = [of_source(place) for place in columns["where"]]
        choice = None
        if "choice" in chosen:
            offered = [find_options(*pair) for pair in zip(columns["question"], columns["reference"], strict=True)]
            seen, hidden = (
                choose(model, examples, accelerator, builder, questions, offered, micro_tokens=run.training.micro_tokens)
                for examples in (heldout, unseen)
            )
            choice = seen, hidden
        ends = first + np.cumsum([len(question.reference) for question in questions])
        each = np.split(likelihoods[first : int(ends[-1])], ends[:-1] - first)
        first = int(ends[-1])
        yield make_table(columns, each, chosen=chosen, cider=cider, choice=choice)


def _every_reference(run: TrainingRun) -> Iterator[str]:
    for rows in row_windows(len(run.heldout.table)):
        yield from references_of(find_questions(run.heldout.table, rows), run.builder)


def _tell(name: str, found: dict[str, Any]) -> None:
    """One line of the metrics that fit, one for each warning."""
    print(f"{name}: held-out answers, {found['chosen']}, with 95 % intervals: {', '.join(_shown(found))}", flush=True)
    for warning in found["warnings"]:
        print(f"{name}: warning: {warning}", flush=True)


def _shown(found: dict[str, Any]) -> Iterator[str]:
    for metric, value in found["metrics"].items():
        form = "{:.3f}" if metric == "cider" else "{:.2%}"
        if value.get("mean") is not None:
            mean, low, high, blind = (form.format(value[key]) for key in ("mean", "low", "high", "blind"))
            yield f"{metric} {mean} ({low} to {high}), blind {blind}"
