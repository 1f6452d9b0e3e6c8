"""Every answer kept: `predictions.parquet`, a row a question, written as they are given.

where             file and line of the row             source            the file, or the pattern of a mix that it is of
turn              which of its supervised turns        images            names of the pictures shown
question          the user's words                     reference         the row's own answer
answer, blind     the model's, and without its pictures
log_likelihood    list<float>: of each token of the reference, its end-of-turn token included
exact ... rouge_l each metric of `answer`              cider, choice     where they are among the chosen metrics
blind_...         of `blind`: exact, and those of the chosen metrics
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import publish, writing
from pipeline.vlm.evaluation.corpus import Cider
from pipeline.vlm.evaluation.metrics import METRICS, score

TEXTS = ("where", "source", "question", "reference", "answer", "blind")
Writer = Callable[[pa.Table], None]


def make_table(
    columns: dict[str, list[Any]],
    log_likelihood: Sequence[np.ndarray],
    *,
    chosen: Sequence[str],
    cider: Cider | None = None,
    choice: tuple[np.ndarray, np.ndarray] | None = None,
) -> pa.Table:
    """Some rows of the file.

    Args:
        columns: what is said and asked: `TEXTS`, `turn` and `images`.
        chosen: metrics that the blind answers are told by, too.
        cider, choice: what these need, where they are chosen: the references, and what was chosen seeing and blind.
    """
    made = {name: pa.array(columns[name], pa.string()) for name in TEXTS[:2]}
    made |= {"turn": pa.array(columns["turn"], pa.int32()), "images": pa.array(columns["images"], pa.list_(pa.string()))}
    made |= {name: pa.array(columns[name], pa.string()) for name in TEXTS[2:]}
    made["log_likelihood"] = pa.array([values.astype(np.float32) for values in log_likelihood], pa.list_(pa.float32()))
    metrics = dict(METRICS)
    if cider is not None:
        metrics["cider"] = lambda answer, reference: cider(answer, [reference])
    said = {name: columns[name] for name in ("answer", "blind", "reference")}
    for name, metric in metrics.items():
        made[name] = pa.array(score(metric, said["answer"], said["reference"]))
    for name in dict.fromkeys(["exact", *chosen]):
        if name in metrics:
            made[f"blind_{name}"] = pa.array(score(metrics[name], said["blind"], said["reference"]))
    if choice is not None:
        made |= {name: pa.array(values, from_pandas=True) for name, values in zip(("choice", "blind_choice"), choice, strict=True)}
    return pa.table(made)


@contextmanager
def writing_tables(path: Path) -> Iterator[Writer]:
    """Yields what adds a row group. The file is there whole or not at all, the same bytes for the same rows."""
    with publish(path) as temporary, ExitStack() as opened:
        writers: list[pq.ParquetWriter] = []

        def write(table: pa.Table) -> None:
            with writing(path):
                if not writers:
                    writers.append(opened.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd")))
                writers[0].write_table(table, row_group_size=max(1, table.num_rows))

        yield write
        with writing(path):
            opened.close()
