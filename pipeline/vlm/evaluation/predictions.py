"""Every answer kept: `predictions.parquet`, a row a question, and the figures that it comes to.

where             file and line of the row             turn              which of its supervised turns
images            names of the pictures shown          question          the user's words
reference         the row's own answer                 answer, blind     the model's, and without its pictures
log_likelihood    list<float>: of each token of the reference, its end-of-turn token included
exact ... rouge_l each metric of `answer`              blind_exact       that of `blind`
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import publish, writing
from pipeline.text import PromptBuilder, TokenTable
from pipeline.vlm.evaluation.metrics import METRICS, exact, headline
from pipeline.vlm.evaluation.questions import Question, Wording

DRAWS, SEED = 1000, 0  # of the bootstrap
TYPES = 12  # question types told apart; the rest are "other"
FEW = 100  # questions below which a figure says little


def make_table(
    table: TokenTable,
    questions: Sequence[Question],
    builder: PromptBuilder,
    *,
    answers: Sequence[str],
    blind: Sequence[str],
    log_likelihood: Sequence[np.ndarray],
) -> pa.Table:
    """The rows of the file, in the order of `questions`."""
    wording, names = Wording(builder), table.image_names()
    references = [builder.decode(question.reference).strip() for question in questions]
    columns: dict[str, Any] = {
        "where": [table.where(question.row) for question in questions],
        "turn": pa.array([question.turn for question in questions], pa.int32()),
        "images": pa.array(
            [names.slice(question.slots.start, len(question.slots)).to_pylist() for question in questions], pa.list_(pa.string())
        ),
        "question": [wording(question) for question in questions],
        "reference": references,
        "answer": [text.strip() for text in answers],
        "blind": [text.strip() for text in blind],
        "log_likelihood": pa.array([values.astype(np.float32) for values in log_likelihood], pa.list_(pa.float32())),
    }
    for name, metric in METRICS.items():
        columns[name] = pa.array(map(metric, columns["answer"], references), pa.float32())
    columns["blind_exact"] = pa.array(map(exact, columns["blind"], references), pa.float32())
    return pa.table(columns)


def write_table(path: Path, table: pa.Table) -> None:
    """Whole or not at all, the same bytes for the same rows."""
    with publish(path) as temporary, writing(path):
        pq.write_table(table, temporary, compression="zstd", row_group_size=10_000)


def summarise(table: pa.Table) -> dict[str, Any]:
    """Headline metrics with bootstrap 95 % intervals, perplexity, and exact match by question type and turn, blind beside each."""
    questions = table.num_rows
    exactly, blind = (table[name].to_numpy() for name in ("exact", "blind_exact"))
    chosen = headline(table["reference"].to_pylist())
    found: dict[str, Any] = {"metrics": {name: _interval(table[name].to_numpy()) for name in chosen}}
    found["blind"] = _interval(blind)
    tokens = table["log_likelihood"].combine_chunks().flatten().to_numpy()
    found["perplexity"] = round(float(np.exp(-tokens.mean(dtype=np.float64))), 4) if len(tokens) else None
    kinds = np.array(_types(table["question"].to_pylist()))
    turns = table["turn"].to_numpy()
    found["types"] = {kind: _group(exactly, blind, kinds == kind) for kind in sorted(set(kinds.tolist()))}
    if turns.max(initial=0) > 0:
        found["turns"] = {str(turn): _group(exactly, blind, turns == turn) for turn in sorted(set(turns.tolist()))}
    found["warnings"] = list(_warnings(exactly, blind, questions))
    return found


def _group(exactly: np.ndarray, blind: np.ndarray, chosen: np.ndarray) -> dict[str, Any]:
    return {
        "questions": int(chosen.sum()), **_interval(exactly[chosen]), "blind": round(float(blind[chosen].mean(dtype=np.float64)), 6)
    }  # fmt: skip


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean, and the 95 % interval of the mean of as many values drawn anew."""
    if not len(values):
        return {}
    drawn = np.random.default_rng(SEED)
    means = [values[drawn.integers(0, len(values), len(values))].mean(dtype=np.float64) for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": round(float(values.mean(dtype=np.float64)), 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def _types(questions: list[str]) -> list[str]:
    """The first two words of a question; rare ones are "other"."""
    firsts = [" ".join(text.lower().split()[:2]) for text in questions]
    counts: dict[str, int] = {}
    for first in firsts:
        counts[first] = counts.get(first, 0) + 1
    common = {first for first, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TYPES]}
    return [first if first in common else "other" for first in firsts]


def _warnings(exactly: np.ndarray, blind: np.ndarray, questions: int) -> Any:
    if questions < FEW:
        yield f"only {questions} questions: differences of some points are chance"
    if questions and exactly.mean() <= blind.mean():
        yield "not better than blind: by these questions the model makes no use of its pictures"
