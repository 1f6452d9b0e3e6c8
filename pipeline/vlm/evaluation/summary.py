"""What `predictions.parquet` comes to: metrics with their intervals, blind beside each, by question type, turn and source.

The file is read in batches; kept of each question are a few numbers.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.vlm.evaluation.corpus import DRAWS, SEED, YesNo
from pipeline.vlm.evaluation.metrics import METRICS

TYPES = 12  # question types told apart; the rest are "other"
OTHER = "other"
FEW = 100  # questions below which a figure says little
TOLD = 0.9  # share of right blind answers from which on questions are said to tell them
Values = dict[str, np.ndarray]


def summarise(path: Path, chosen: Sequence[str], why: str = "") -> dict[str, Any]:
    """The content of scores.json.

    Args:
        chosen: metrics to tell; the first that is one of a single answer is what types, turns and sources are compared by.
        why: in words, why these.
    """
    file = pq.ParquetFile(path)
    by = next((name for name in chosen if name in METRICS), "exact")
    told = [name for name in dict.fromkeys(["exact", by, *chosen]) if name in file.schema_arrow.names]
    numbers = [*told, *(f"blind_{name}" for name in told), "turn"]
    parts = [{name: _floats(batch[name]) for name in numbers} for batch in _batches(file, numbers)]
    values = {name: np.concatenate([part[name] for part in parts] or [np.empty(0, np.float32)]) for name in numbers}
    found: dict[str, Any] = {
        "questions": len(values["exact"]),
        "by": by,
        "chosen": why,
        "metrics": {name: _metric(values, name) for name in told if name in chosen},
    }
    if "yes_no" in chosen:
        found["metrics"]["yes_no"] = _yes_no(file)
    found["exact"], found["blind"] = _interval(values["exact"]), _interval(values["blind_exact"])
    found["perplexity"] = _perplexity(file)
    found["types"] = _groups(values, by, *_coded(file, "question"), most=TYPES)
    turns = values["turn"].astype(np.int64)
    if turns.max(initial=0) > 0:
        found["turns"] = _groups(values, by, turns, [str(turn) for turn in range(int(turns.max()) + 1)])
    codes, sources = _coded(file, "source")
    if len(sources) > 1:
        found["sources"] = _groups(values, by, codes, sources)
    found["warnings"] = list(_warnings(values[by], values[f"blind_{by}"]))
    return found


def _batches(file: pq.ParquetFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
    return file.iter_batches(batch_size=16_384, columns=columns)


def _floats(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(np.float32)  # type: ignore[no-any-return]


def _metric(values: Values, name: str) -> dict[str, Any]:
    """Of those questions that it is measured of."""
    asked = ~np.isnan(values[name])
    found = _interval(values[name][asked]) | {"blind": _mean(values[f"blind_{name}"][asked])}
    return found if asked.all() else found | {"questions": int(asked.sum())}


def _yes_no(file: pq.ParquetFile) -> dict[str, Any]:
    """F1 of yes as the mean, and all else that POPE counts."""
    empty = np.zeros((2, 3), np.int64)
    seen, blind = YesNo(empty), YesNo(empty)
    for batch in _batches(file, ["answer", "blind", "reference"]):
        answers, unseen, references = (batch[name].to_pylist() for name in ("answer", "blind", "reference"))
        seen, blind = seen + YesNo.of(answers, references), blind + YesNo.of(unseen, references)
    figures = seen.figures()
    if not seen.questions:
        return figures
    return {"mean": figures["f1"], "low": figures.pop("f1_low"), "high": figures.pop("f1_high")} | {
        "blind": blind.figures()["f1"], **figures
    }  # fmt: skip


def _perplexity(file: pq.ParquetFile) -> float | None:
    total, count = 0.0, 0
    for batch in _batches(file, ["log_likelihood"]):
        tokens = batch["log_likelihood"].flatten().to_numpy()
        total, count = total + float(tokens.sum(dtype=np.float64)), count + len(tokens)
    value = float(np.exp(-total / count)) if count else math.nan
    return round(value, 4) if math.isfinite(value) else None  # of a run that has diverged it is not


def _coded(file: pq.ParquetFile, column: str) -> tuple[np.ndarray, list[str]]:
    """int64 [N] and what they stand for: the first two words of each question, or the source as it is."""
    chunks = []
    for batch in _batches(file, [column]):
        values = batch[column]
        if column == "question":
            words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(values)), max_splits=2)
            values = pc.binary_join(pc.list_slice(words, 0, 2), " ")
        chunks.append(values.dictionary_encode())
    if not chunks:
        return np.empty(0, np.int64), []
    whole = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in whole.chunks]).astype(np.int64)
    return codes, whole.chunk(0).dictionary.to_pylist()


def _groups(values: Values, by: str, codes: np.ndarray, names: Sequence[str], *, most: int = 0) -> dict[str, Any]:
    """Figures of each group of questions; with `most` only of the largest, and of all others together."""
    counts = np.bincount(codes, minlength=len(names))
    order = sorted(np.flatnonzero(counts).tolist(), key=lambda code: (-counts[code], names[code]))
    kept = order[:most] if most else order
    found = {names[code]: _group(values, by, codes == code) for code in kept}
    if len(kept) < len(order):
        rest = ~np.isin(codes, kept) | (codes == (names.index(OTHER) if OTHER in names else -1))
        found[OTHER] = _group(values, by, rest)
    return dict(sorted(found.items()))


def _group(values: Values, by: str, chosen: np.ndarray) -> dict[str, Any]:
    return {
        "questions": int(chosen.sum()), **_interval(values[by][chosen]), "blind": _mean(values[f"blind_{by}"][chosen])
    }  # fmt: skip


def _mean(values: np.ndarray) -> float | None:
    return round(float(values.mean(dtype=np.float64)), 6) if len(values) else None


def _interval(values: np.ndarray) -> dict[str, float]:
    """Mean, and the 95 % interval of the mean of as many values drawn anew."""
    if not len(values):
        return {}
    drawn = np.random.default_rng(SEED)
    means = [values[drawn.integers(0, len(values), len(values))].mean(dtype=np.float64) for _ in range(DRAWS)]
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": round(float(values.mean(dtype=np.float64)), 6), "low": round(float(low), 6), "high": round(float(high), 6)}


def _warnings(seen: np.ndarray, blind: np.ndarray) -> Iterator[str]:
    if len(seen) < FEW:
        yield f"only {len(seen)} questions: differences of some points are chance"
    if not len(seen):
        return
    gain = _interval(seen - blind)
    if gain["mean"] <= 0:
        yield "not better than blind: by these questions the model makes no use of its pictures"
    elif gain["low"] <= 0:
        yield f"not clearly better than blind: {gain['mean']:.1%} more may be chance, from {gain['low']:.1%} to {gain['high']:.1%}"
    if blind.mean() >= TOLD:
        yield f"these questions tell their answers: without its pictures the model has {blind.mean():.1%}"
