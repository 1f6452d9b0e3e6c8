"""predictions.parquet of one stage: summed up batch by batch in Arrow, and the few rows that are shown.

Kept of each of N questions are five numbers; no question becomes a Python object but those asked for with `rows`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.report.answers_file import AnswersFile

LONG = 60  # letters of an answer that tell it from another in the confusion
MOST = 8  # references and answers in the confusion
KEY = ["where", "turn", "question", "reference"]
OTHER = "other"


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts [references, answers + 1]; the last column is of all other answers."""

    references: list[str]
    answers: list[str]
    counts: list[list[int]]


class Answers:
    """All answers of one stage.

    Args:
        file: predictions.parquet.
        kinds: question types that are told apart (see `pipeline.vlm.evaluation.predictions`).

    Attributes:
        right: bool [N], by exact match.
        surprise: float32 [N], minus the mean log-likelihood of a token of the reference; infinite where it is not finite.
        kind: int32 [N], the place in `kinds`; len(kinds) for all others.

    Raises `PipelineError` for what no stage has written.
    """

    def __init__(self, file: BinaryIO, kinds: Sequence[str], *, where: str) -> None:
        self.kinds, self._where = [kind for kind in kinds if kind != OTHER], where
        self._file = AnswersFile(file, where=where)
        parts = [self._numbers(batch) for batch in self._batches(["exact", "log_likelihood", "question"])]
        columns = zip(*parts, strict=True) if parts else ([np.zeros(0, bool)], [np.zeros(0, np.float32)], [np.zeros(0, np.int32)])
        self.right, self.surprise, self.kind = (np.concatenate(list(column)) for column in columns)

    def __len__(self) -> int:
        return len(self.right)

    def kind_name(self, number: int) -> str:
        place = int(self.kind[number])
        return self.kinds[place] if place < len(self.kinds) else OTHER

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        return self._file.batches(columns)

    def _numbers(self, batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        right = np.asarray(batch["exact"]) == 1
        tokens = np.asarray(batch["log_likelihood"].flatten(), np.float64)
        sizes = np.asarray(pc.fill_null(pc.list_value_length(batch["log_likelihood"]), 0))
        owner = np.repeat(np.arange(batch.num_rows), sizes)
        surprise = -np.bincount(owner, weights=tokens, minlength=batch.num_rows) / np.maximum(sizes, 1)
        words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(batch["question"])), max_splits=2)
        first = pc.binary_join(pc.list_slice(words, 0, 2), " ")
        place = pc.index_in(first, value_set=pa.array(self.kinds, pa.string()))
        kind = np.asarray(pc.fill_null(place, len(self.kinds)), np.int32)
        return right, np.nan_to_num(surprise, nan=np.inf, posinf=np.inf).astype(np.float32), kind

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """These rows, in this order; only their row groups are read, one after the other."""
        wanted, found, first = np.unique(np.asarray(numbers, np.int64)), dict[int, dict[str, Any]](), 0
        for group, size in enumerate(self._file.sizes):
            inside = wanted[(wanted >= first) & (wanted < first + size)]
            if len(inside):
                found |= dict(zip(inside.tolist(), self._file.rows(group, inside - first), strict=True))
            first += size
        return [found[int(number)] for number in numbers]

    def confusion(self) -> Confusion:
        """The most frequent references by the most frequent answers to them; long ones count as the same from letter 60 on."""
        total: pa.Table | None = None
        for batch in self._batches(["reference", "answer"]):
            cut = {name: pc.utf8_slice_codeunits(batch[name], 0, LONG) for name in ("reference", "answer")}
            part = pa.table(cut | {"count": pa.array(np.ones(batch.num_rows, np.int64))})
            total = _summed(part if total is None else pa.concat_tables([total, part]), ["reference", "answer"])
        if total is None:
            return Confusion([], [], [])
        references = _frequent(total, "reference")
        kept = total.filter(pc.is_in(total["reference"], value_set=pa.array(references, pa.string())))
        given = _frequent(kept, "answer")
        answers = [text for text in references if text in given]  # in the same order: what is right lies on the diagonal
        answers += [text for text in given if text not in references]
        sums = dict.fromkeys(((one, other) for one in references for other in [*answers, None]), 0)
        known = pc.is_in(kept["answer"], value_set=pa.array(answers, pa.string()))
        for row in kept.filter(known).to_pylist():
            sums[row["reference"], row["answer"]] = row["count"]
        for row in _summed(kept.filter(pc.invert(known)), ["reference"]).to_pylist():
            sums[row["reference"], None] = row["count"]
        return Confusion(references, answers, [[sums[one, other] for other in [*answers, None]] for one in references])

    def matched(self, other: "Answers") -> np.ndarray:
        """int64 [N]: the row of `other` that is the same question with the same reference; -1 where it has none."""
        if not len(self) or not len(other):
            return np.full(len(self), -1, np.int64)
        if len(self) == len(other) and all(
            one.equals(two) for one, two in zip(self._batches(KEY), other._batches(KEY), strict=True)
        ):
            return np.arange(len(self))
        mine, theirs = (
            pa.Table.from_batches(self_._batches(KEY)).append_column(name, pa.array(np.arange(len(self_))))
            for self_, name in ((self, "mine"), (other, "theirs"))
        )
        both = mine.join(theirs, KEY, join_type="inner")
        found = np.full(len(self), -1, np.int64)
        found[both["mine"].to_numpy()] = both["theirs"].to_numpy()
        return found


def _summed(table: pa.Table, keys: list[str]) -> pa.Table:
    return table.group_by(keys).aggregate([("count", "sum")]).rename_columns([*keys, "count"])


def _frequent(table: pa.Table, key: str) -> list[str]:
    """The most frequent values, equal ones by name."""
    sums = _summed(table.select([key, "count"]), [key])
    order = pc.sort_indices(sums, [("count", "descending"), (key, "ascending")])
    return sums.take(order[:MOST])[key].to_pylist()  # type: ignore[no-any-return]


def worst_first(answers: Answers, chosen: np.ndarray, most: int) -> list[int]:
    """At most so many of the rows `chosen`, the least likely reference first; every question type has its turn."""
    queues = []
    for kind in range(len(answers.kinds) + 1):
        inside = chosen[answers.kind[chosen] == kind]
        surprise = answers.surprise[inside]
        if len(inside) > most:
            edge = np.partition(-surprise, most - 1)[most - 1]
            inside, surprise = inside[-surprise <= edge], surprise[-surprise <= edge]
        queues.append(inside[np.lexsort((inside, -surprise))][:most])
    turns = [(turn, int(number)) for queue in queues for turn, number in enumerate(queue)]
    taken = [number for _, number in sorted(turns, key=lambda item: (item[0], -float(answers.surprise[item[1]]), item[1]))[:most]]
    return sorted(taken, key=lambda number: (-float(answers.surprise[number]), number))
