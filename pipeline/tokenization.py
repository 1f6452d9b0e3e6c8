"""Stage 2's work: a data set's records -> its token table, streaming, in order, in parallel when asked.

Rows that are too long are cut, skipped or stop the stage, as the parameter says; what is refused is listed by file and
line with the reason. An image is never cut, and a row always keeps at least one supervised token.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.errors import BAD_ROWS, PipelineError
from pipeline.images import Images, digest
from pipeline.records import Record
from pipeline.text import Prompt, PromptBuilder
from pipeline.tokens import SCHEMA

CHUNK = 1024  # records a task, and rows an Arrow record batch


@dataclass(slots=True)
class Summary:
    """What became of a data set's rows: `rows_in == rows + len(refused)` always."""

    rows_in: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    images: int = 0
    longest: int = 0
    cut: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)


class Tokenizer:
    """Records -> Arrow batches for one tokenizer, image root and length policy; built once in each process."""

    def __init__(self, builder: dict[str, Any], images: Images, max_tokens: int, too_long: str) -> None:
        self._builder = PromptBuilder(**builder)
        self._root, self._max, self._policy = images, max_tokens, too_long
        self._hashes: dict[str, bytes] = {}

    def __call__(self, records: list[Record]) -> tuple[pa.RecordBatch, Summary]:
        """One chunk of records -> its rows and what became of them."""
        found = Summary(rows_in=len(records))
        kept: list[tuple[Record, Prompt]] = []
        prompts = self._builder.build_batch([record.turns for record in records])
        for record, prompt in zip(records, prompts, strict=True):
            fitted = self._fit(prompt, record, found)
            if fitted is not None:
                kept.append((record, fitted))
        found.rows = len(kept)
        found.tokens = sum(len(prompt.ids) for _, prompt in kept)
        found.supervised = sum(end - start for _, prompt in kept for start, end in prompt.spans)
        found.images = sum(len(prompt.images) for _, prompt in kept)
        found.longest = max((len(prompt.ids) for _, prompt in kept), default=0)
        return self._arrow(kept), found

    def _fit(self, prompt: Prompt, record: Record, found: Summary) -> Prompt | None:
        if len(prompt.ids) <= self._max:
            return prompt
        reason = f"{len(prompt.ids)} tokens, tokenize.max_tokens is {self._max}"
        spans = tuple((start, min(end, self._max)) for start, end in prompt.spans if start < self._max)
        end = spans[-1][1] if spans else self._max
        images_fit = all(start + self._builder.tokens <= end for start in prompt.images)
        if self._policy == "cut" and images_fit and spans:
            found.cut += 1
            return Prompt(prompt.ids[: spans[-1][1]], spans, prompt.images)
        if self._policy == "cut":
            reason += ": the cut would take " + ("its answers" if images_fit else "part of an image")
        found.refused.append({"where": record.where, "reason": reason, "remedy": "raise tokenize.max_tokens or shorten the row"})
        return None

    def _hash(self, name: str, where: str) -> bytes:
        if name not in self._hashes:
            if len(self._hashes) >= 1_000_000:  # bounded: an image's rows mostly stand near each other
                self._hashes.clear()
            try:
                self._hashes[name] = digest(self._root.read(name))
            except PipelineError as error:
                raise PipelineError(f"{error.where}: {error.what}", where=where, remedy=error.remedy, code=error.code) from None
        return self._hashes[name]

    def _arrow(self, kept: list[tuple[Record, Prompt]]) -> pa.RecordBatch:
        columns = [
            _list_column([prompt.ids for _, prompt in kept]),
            _list_column([np.array(prompt.spans, np.int32).reshape(-1) for _, prompt in kept]),
            _list_column([np.array(prompt.images, np.int32) for _, prompt in kept]),
            pa.array([[self._hash(name, record.where) for name in record.images] for record, _ in kept], pa.list_(pa.binary(32))),
            pa.array([list(record.images) for record, _ in kept], pa.list_(pa.string())),
            pa.array([record.where for record, _ in kept], pa.string()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _list_column(rows: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows) if rows else np.empty(0, np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(np.int32)))


def tokenize(
    records: Iterator[Record], settings: tuple[Any, ...], total: Summary, *, workers: int, progress: Callable[[int], object]
) -> Iterator[pa.RecordBatch]:
    """Record batches in the records' order, `total` filled on the way; `settings` are `Tokenizer`'s arguments.

    Raises `PipelineError` for a row that cannot be used, and under `too_long: stop` for the first ten of a chunk.
    """
    for batch, found in _run(_chunks(records), settings, workers):
        for name in ("rows_in", "rows", "tokens", "supervised", "images", "cut"):
            setattr(total, name, getattr(total, name) + getattr(found, name))
        total.longest = max(total.longest, found.longest)
        total.refused += found.refused
        if found.refused and settings[-1] == "stop":
            rows = "; ".join(f"{row['where']} ({row['reason']})" for row in found.refused[:10])
            raise PipelineError(
                f"rows too long: {rows}", remedy="raise tokenize.max_tokens or set tokenize.too_long", code=BAD_ROWS
            )
        progress(found.rows_in)
        if batch.num_rows:
            yield batch
    if total.rows_in != total.rows + len(total.refused):
        raise AssertionError("a row was lost")


def _chunks(records: Iterator[Record]) -> Iterator[list[Record]]:
    while chunk := list(islice(records, CHUNK)):
        yield chunk


def _run(chunks: Iterator[list[Record]], settings: tuple[Any, ...], workers: int) -> Iterator[tuple[pa.RecordBatch, Summary]]:
    tokenizer = Tokenizer(*settings)  # bad settings fail here, where they can be told, not in the start of a worker
    if workers <= 1:
        yield from map(tokenizer, chunks)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, settings) as pool:
        waiting: list[Future] = []
        for chunk in chunks:  # a bounded number in flight, taken in order
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


_tokenizer: Tokenizer | None = None


def _start(*settings: Any) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(*settings)


def _work(records: list[Record]) -> tuple[pa.RecordBatch, Summary]:
    assert _tokenizer is not None
    return _tokenizer(records)
