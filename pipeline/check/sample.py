"""The first rows of a data set as a training stage's inputs in a folder of their own, and how much the whole set holds.

Features are noise: what is timed on them takes the time that real ones take, and nothing need be encoded for it.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import xxhash

from pipeline.check.counting import Keys
from pipeline.core import BAD_ROWS, PipelineError, make_folder
from pipeline.features import Encoder, write_index, write_shard
from pipeline.params import Tokenize
from pipeline.records import BadRow, Mixture, Record, Source
from pipeline.text import PromptBuilder, RowTokenizer, Summary, TokenTable, tokenize, write_tokens

ROWS = 256  # of which whole powers of two are taken: a step then divides them
LOOKED_AT = 4 * ROWS  # rows that may be bad or too long before there are enough


@dataclass(frozen=True, slots=True)
class Size:
    """Of a data set: good rows, places of pictures in them, and the names of those."""

    rows: int
    slots: int
    names: Keys

    @property
    def pictures(self) -> int:
        return len(self.names)

    def beyond(self, other: "Size") -> int:
        """Pictures that the other data set does not name."""
        return self.pictures - int(other.names.has(self.names.sorted()).sum())


def measure_size(source: Source | Mixture, images: str) -> Size:
    """Read every row; `images` tells pictures of one name in two places apart."""
    rows = slots = 0
    names, records = Keys(), source.records()
    while chunk := list(islice(records, 4096)):
        good = [row for row in chunk if not isinstance(row, BadRow)]
        shown = [f"{images}\n{name}".encode("utf-8", "surrogatepass") for row in good for name in row.images]
        names.add(np.array([xxhash.xxh3_64_intdigest(name) for name in shown], np.uint64))
        rows, slots = rows + len(good), slots + len(shown)
    return Size(rows, slots, names)


def write_sample(
    folder: Path, name: str, source: Source | Mixture, builder: PromptBuilder, limits: Tokenize, *, most: int = ROWS
) -> TokenTable:
    """The first rows that can be trained on, as `name` in `folder`/tokens: at most `most`. Raises `PipelineError` for none."""
    too_long = "skip" if limits.too_long == "stop" else limits.too_long
    tokenizer = RowTokenizer(builder, source.images, limits.max_tokens, too_long)
    made = tokenize(
        islice(source.records(), LOOKED_AT), tokenizer, Summary(), workers=1, progress=_nothing, reject=_nothing, refuse=_nothing
    )
    rows = pa.Table.from_batches(list(_enough(made)))
    if not len(rows):
        raise PipelineError(
            f"none of the first {LOOKED_AT:,} rows can be trained on",
            where=f"data.{name}",
            remedy="python -m pipeline.check",
            code=BAD_ROWS,
        )
    write_tokens(
        folder / f"tokens/{name}.arrow", rows.slice(0, 1 << (min(most, len(rows)).bit_length() - 1)).to_batches(), builder.spec()
    )
    return TokenTable(folder / f"tokens/{name}.arrow")


def _enough(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    found = 0
    for batch in batches:
        yield batch
        found += len(batch)
        if found >= ROWS:
            return


def _nothing(_: object) -> None:
    pass


def write_store(out: Path, encoder: Encoder, tables: Sequence[TokenTable]) -> float:
    """`out`: a store with a row for each picture of the tables; returns the seconds that writing a row took."""
    hashes = np.unique(np.concatenate([table.image_hashes() for table in tables]), axis=0)
    make_folder(out)
    path, spec, rows = out / "sample.h5", encoder.row_spec(), list(_noise(encoder, len(hashes)))
    began = time.perf_counter()
    write_shard(path, hashes, spec, encoder.row_format, rows)
    spent = (time.perf_counter() - began) / max(1, len(hashes))
    write_index(out, [(path.name, len(hashes))] if len(hashes) else [], spec)
    return spent


def _noise(encoder: Encoder, count: int) -> Iterator[np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    for start in range(0, count, 64):
        shape = min(64, count - start), encoder.tokens, encoder.width
        yield encoder.row_format.encode(torch.randn(shape, generator=generator)).numpy()


def sample_pictures(source: Source | Mixture, count: int) -> list[bytes]:
    """The bytes of the first pictures that rows name and that can be read."""
    found: dict[str, bytes] = {}
    for record in islice(source.records(), LOOKED_AT):
        for name in record.images if isinstance(record, Record) else ():
            if name not in found and len(found) < count:
                found[name] = source.images.read(name)
        if len(found) == count:
            break
    return list(found.values())
