"""Stage 2's work: a data set's records -> its token table, streaming, in order, by several threads.

A record holds a conversation's turns, texts and places of images, and the images' names. `PromptBuilder` makes of it token ids with
P placeholders an image, the supervised spans and each image's first position. A row of the table: `ids` int32 [T], `spans`
int32 [answers, 2], `image_start` int32 [k], `image_sha256` and `image_name` [k], and `where` it came from. An image's slot is its
number among all images of the table, in order.
Here it is decided which rows are used: those whose pictures can be read and decoded, on their side of a held-out part.
Rows that are too long are cut, skipped or stop the stage, as the parameter says; what is refused is listed by file and
line with the reason. An image is never cut, and a row always keeps at least one supervised token.
"""

import gc
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import BAD_ROWS, PipelineError, prefetch
from pipeline.records import BadRow, Digests, GoodImages, Images, Record, Side, Split, bad_record, readable
from pipeline.text.builder import PromptBuilder
from pipeline.text.prompts import Prompt, Prompts, to_bounds
from pipeline.text.token_table import SCHEMA

CHUNK = 128  # records a task: what becomes of them on the way fits in a processor's cache
BATCH = 8  # tasks an Arrow record batch
TOO_LONG = "raise tokenize.max_tokens or shorten the row"
_OWN_THREADS = "TOKENIZERS_PARALLELISM"


@dataclass(slots=True)
class Summary:
    """What became of a data set's rows: `rows_in == rows + refused + bad + other_side + both_sides` always.

    `rejected` holds a chunk's bad rows, `too_long` its refused ones; in the summary of a whole data set, which may have millions,
    `rejected` is empty and `too_long` has the first ten. `straddling` names the first rows with pictures of both sides.
    """

    rows_in: int = 0
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    images: int = 0
    longest: int = 0
    cut: int = 0
    bad: int = 0
    other_side: int = 0
    both_sides: int = 0
    refused: int = 0
    too_long: list[dict[str, str]] = field(default_factory=list)
    rejected: list[BadRow] = field(default_factory=list)
    straddling: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RowFilter:
    """Which rows are used.

    Args:
        good: table of the pictures that are known to decode (`GoodImages`); others are decoded to see whether they can be.
        side: of a held-out part by `share` and `seed`; None = every row.
    """

    good: Path | None = None
    side: Side | None = None
    share: float = 0.0
    seed: int = 0


class RowTokenizer:
    """Records -> Arrow batches for one tokenizer, image root and length policy; used by several threads."""

    def __init__(
        self, builder: PromptBuilder, images: Images, max_tokens: int, too_long: str, rows: RowFilter | None = None
    ) -> None:
        rows = rows or RowFilter()
        self._builder, self._max, self.too_long = builder, max_tokens, too_long
        self._digests = Digests(images, GoodImages(rows.good) if rows.good else None)
        self._side = rows.side
        self._new_split = partial(Split, self._digests, share=rows.share, seed=rows.seed)

    def __call__(self, rows: Sequence[Record | BadRow]) -> tuple[pa.RecordBatch, Summary]:
        """One chunk of records -> its rows and what became of them."""
        found = Summary(rows_in=sum(row.rows if isinstance(row, BadRow) else 1 for row in rows))
        records, prompts = self._build(self._usable(rows, found), found)
        records, prompts = self._fit(records, prompts, found)
        found.rows, found.tokens, found.images = len(prompts), len(prompts.ids), len(prompts.image_starts)
        found.supervised = int((prompts.spans[:, 1] - prompts.spans[:, 0]).sum(dtype=np.int64))
        found.longest = int(np.diff(prompts.bounds).max(initial=0))
        return self._arrow(records, prompts), found

    def _fit(self, records: list[Record], prompts: Prompts, found: Summary) -> tuple[list[Record], Prompts]:
        if np.diff(prompts.bounds).max(initial=0) <= self._max:
            return records, prompts
        kept: list[tuple[Record, Prompt]] = []
        for record, prompt in zip(records, prompts, strict=True):
            fitted, reason = fit_length(prompt, image_tokens=self._builder.tokens, max_tokens=self._max, too_long=self.too_long)
            found.cut += fitted is not None and fitted is not prompt
            if fitted is None:
                found.too_long.append({"where": record.where, "reason": reason, "remedy": TOO_LONG})
            else:
                kept.append((record, fitted))
        found.refused = len(found.too_long)
        return [record for record, _ in kept], Prompts.of([prompt for _, prompt in kept])

    def _build(self, rows: list[Record | BadRow], found: Summary) -> tuple[list[Record], Prompts]:
        """The records that the template and the tokenizer take, and their prompts; every bad row is noted, in order."""
        records = [row for row in rows if isinstance(row, Record)]
        prompts = build_or_refuse(self._builder, records)
        found.rejected = [row for row in rows if isinstance(row, BadRow)]
        if not isinstance(prompts, Prompts):
            made, found.rejected, records, kept = iter(prompts), [], [], list[Prompt]()
            for row in rows:
                verdict = row if isinstance(row, BadRow) else next(made)
                if isinstance(row, Record) and isinstance(verdict, Prompt):
                    records.append(row)
                    kept.append(verdict)
                elif isinstance(verdict, BadRow):
                    found.rejected.append(verdict)
            prompts = Prompts.of(kept)
        found.bad = sum(row.rows for row in found.rejected)
        return records, prompts

    def _usable(self, rows: Sequence[Record | BadRow], found: Summary) -> list[Record | BadRow]:
        """The rows on the side that is asked for; one whose pictures cannot be read or decoded is bad."""
        dealt: Iterable[Record | BadRow] = rows
        split = self._new_split() if self._side else None  # it counts, and several threads are here
        if split is not None and self._side is not None:
            dealt = split.records(rows, self._side)
        usable = list(readable(dealt, self._digests.digest_of_decodable))
        if split is not None:
            counts = split.counts
            found.other_side = counts["train" if self._side == "heldout" else "heldout"]
            found.both_sides, found.straddling = counts["neither"], split.neither
        return usable

    def _arrow(self, records: list[Record], prompts: Prompts) -> pa.RecordBatch:
        names = [name for record in records for name in record.images]
        slots = to_bounds(len(record.images) for record in records)
        hashes = pa.py_buffer(b"".join(map(self._digests.digest_of_decodable, names)))
        columns = [
            _lists(prompts.bounds, pa.array(prompts.ids)),
            _lists(2 * prompts.span_bounds, pa.array(prompts.spans.reshape(-1))),
            _lists(prompts.image_bounds, pa.array(prompts.image_starts)),
            _lists(slots, pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(names), [None, hashes])),
            _lists(slots, pa.array(names, pa.string())),
            pa.array([record.where for record in records], pa.string()),
        ]
        return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def build_or_refuse(builder: PromptBuilder, records: Sequence[Record]) -> Prompts | list[Prompt | BadRow]:
    """Prompts of all records; or, where the template or the tokenizer refuses some, of each its prompt or why it is bad."""
    try:
        return builder.build_batch([record.turns for record in records])
    except PipelineError:  # of some record, which only one by one will tell
        return [_prompt(builder, record) for record in records]


def _prompt(builder: PromptBuilder, record: Record) -> Prompt | BadRow:
    try:
        return builder.build(record.turns)
    except PipelineError as error:
        return bad_record(record, error.what, error.remedy)


def fit_length(prompt: Prompt, *, image_tokens: int, max_tokens: int, too_long: str) -> tuple[Prompt | None, str]:
    """A prompt as `tokenize.too_long` leaves it: itself, cut behind a supervised token, or None and why it is refused."""
    if len(prompt.ids) <= max_tokens:
        return prompt, ""
    reason = f"{len(prompt.ids)} tokens, tokenize.max_tokens is {max_tokens}"
    spans = tuple((start, min(end, max_tokens)) for start, end in prompt.spans if start < max_tokens)
    end = spans[-1][1] if spans else max_tokens
    images_fit = all(start + image_tokens <= end for start in prompt.image_starts)
    if too_long == "cut" and images_fit and spans:
        return Prompt(prompt.ids[:end], spans, prompt.image_starts), ""
    if too_long == "cut":
        reason += ": the cut would take " + ("its answers" if images_fit else "part of an image")
    return None, reason


def _lists(bounds: np.ndarray, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), values)


def tokenize(
    rows: Iterator[Record] | Iterator[Record | BadRow],
    tokenizer: RowTokenizer,
    total: Summary,
    *,
    workers: int,
    progress: Callable[[int], object],
    reject: Callable[[BadRow], object] | None = None,
    refuse: Callable[[dict[str, str]], object] | None = None,
) -> Generator[pa.RecordBatch, Any, None]:
    """Record batches in the records' order, `total` filled on the way, by so many threads beside the one that reads.

    `reject` is told of every bad row and `refuse` of every row that is too long, in order. Raises `PipelineError` for the first
    bad row where there is nobody to tell, and under `too_long: stop` for the first ten of a chunk.
    """
    done: list[pa.RecordBatch] = []
    with closing(_run(_chunks(rows), tokenizer, workers)) as chunks:
        for batch, found in chunks:
            _add(found, total)
            for row in found.rejected:
                (reject or _raise)(row)
            if refuse is not None:
                for refused in found.too_long:
                    refuse(refused)
            if found.refused and tokenizer.too_long == "stop":
                listed = "; ".join(f"{row['where']} ({row['reason']})" for row in found.too_long[:10])
                raise PipelineError(
                    f"rows too long: {listed}", remedy="raise tokenize.max_tokens or set tokenize.too_long", code=BAD_ROWS
                )
            progress(found.rows_in)
            done.append(batch)
            if len(done) == BATCH:
                yield from _joined(done)
                done = []
    yield from _joined(done)
    if total.rows_in != total.rows + total.refused + total.bad + total.other_side + total.both_sides:
        raise AssertionError("a row was lost")


def _add(found: Summary, total: Summary) -> None:
    """A chunk's figures to those of its data set."""
    for name in ("rows_in", "rows", "tokens", "supervised", "images", "cut", "refused", "bad", "other_side", "both_sides"):
        setattr(total, name, getattr(total, name) + getattr(found, name))
    total.longest = max(total.longest, found.longest)
    total.too_long = (total.too_long + found.too_long)[:10]
    total.straddling = (total.straddling + found.straddling)[:10]


def _joined(batches: list[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    if any(batch.num_rows for batch in batches):
        yield pa.concat_batches(batches)


def _raise(row: BadRow) -> None:
    raise PipelineError(row.reason, where=row.where, remedy=row.remedy, code=BAD_ROWS)


def _chunks(rows: Iterator[Record] | Iterator[Record | BadRow]) -> Iterator[Sequence[Record | BadRow]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


@contextmanager
def _undisturbed(workers: int) -> Iterator[None]:
    """Two habits of the process that cost a sixth of the time each, put off while rows go by.

    Python looks for cycles after every 700 new objects, and rows hold none. The tokenizer shares every call out to threads of
    its own, which only get in the way of several callers (it looks at the environment at every call).
    """
    thresholds, threads = gc.get_threshold(), os.environ.get(_OWN_THREADS)
    gc.set_threshold(thresholds[0] and max(thresholds[0], 100_000), *thresholds[1:])  # 0 = never
    if workers > 1:
        os.environ[_OWN_THREADS] = "false"
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if threads is not None:
            os.environ[_OWN_THREADS] = threads
        else:
            os.environ.pop(_OWN_THREADS, None)


def _run(
    chunks: Iterator[Sequence[Record | BadRow]], tokenizer: RowTokenizer, workers: int
) -> Generator[tuple[pa.RecordBatch, Summary], Any, None]:
    """Chunks in their order, tokenised by threads: the tokenizer, hashes and picture decoders let Python go on reading."""
    with _undisturbed(workers), closing(prefetch(chunks, tokenizer, depth=workers, threads=workers, where=_first)) as done:
        for _, found in done:
            yield found


def _first(chunk: Sequence[Record | BadRow]) -> str:
    return chunk[0].where
