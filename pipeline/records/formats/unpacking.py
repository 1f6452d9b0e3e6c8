"""What a block of an Arrow or Parquet file may unpack to: a few kilobytes can say that they are gigabytes.

Memory is bounded while a block is unpacked, whatever it is packed in; values are counted before they become Python's; and of
views, which show one text any number of times, those that are more than memory holds are refused before they are looked at.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import bounded_memory, brief
from pipeline.records.formats.row import MAX_VALUES

MAX_BATCH = 256 << 20  # bytes of rows that become Python's at once
MEMORY = 1 << 30  # bytes that a block may take while it is unpacked
_TIMES = 16  # that a text may stand in a block whose rows share it
ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, IndexError, TypeError, NotImplementedError, MemoryError)


def _is_shown_over_and_over(array: pa.Array) -> bool:
    """Whether views, of which each has a length and a place, are of much more text than there is: each is validated, all of it."""
    kind = array.type
    if pa.types.is_struct(kind):
        return any(_is_shown_over_and_over(array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        _, views, *texts = array.buffers()
        lengths = np.frombuffer(views or b"", np.int32)[4 * array.offset : 4 * (array.offset + len(array)) : 4]
        return int(lengths.sum(dtype=np.int64)) > MEMORY + _TIMES * sum(text.size for text in texts)
    return pa.types.is_nested(kind) and hasattr(array, "values") and _is_shown_over_and_over(array.values)


def is_sound(batch: pa.RecordBatch) -> bool:
    if any(map(_is_shown_over_and_over, batch.columns)):
        raise Refused("its texts are shown over and over")
    try:
        batch.validate(full=True)
    except ERRORS:
        return False
    return True


def unpacked(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Each batch, for which `MEMORY` is enough; raises `ERRORS`. The one before should be gone by then."""
    while True:
        with bounded_memory(MEMORY):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
        del batch


class Refused(ValueError):
    pass


def why(error: BaseException) -> str:
    """What is wrong with a block that could not be read."""
    if isinstance(error, MemoryError):
        return f"unpacks to more than {MEMORY >> 20:,} MB at once"
    return str(error) if isinstance(error, Refused) else f"damaged: {brief(error)}"


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type in which every value stands by itself: of many that stand once (views, dictionaries) `nbytes` tells nothing."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if types.is_string_view(kind) or types.is_binary_view(kind):
        return pa.large_string() if types.is_string_view(kind) else pa.large_binary()
    if types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_plain(kind.field(i).type)) for i in range(kind.num_fields)])
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.large_list(kind.value_field.with_type(_plain(kind.value_type)))
    if types.is_fixed_size_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)), kind.list_size)
    if types.is_map(kind):
        return pa.map_(_plain(kind.key_type), kind.item_field.with_type(_plain(kind.item_type)))
    if types.is_nested(kind):
        raise Refused(f"a column is {kind}, which is not read")
    return kind


@lru_cache(maxsize=64)
def _plain_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_type(_plain(field.type)) for field in schema])


def _count(array: pa.Array) -> int:
    """Values of an array, those within its rows included: a list of nothings takes no byte, and a place of each in Python."""
    kind, inner = array.type, None
    if pa.types.is_struct(kind):
        return len(array) + sum(_count(array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_fixed_size_list(kind):
        inner = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
    elif len(array) and (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind)):
        first, last = array.offsets[0].as_py(), array.offsets[-1].as_py()
        inner = array.values.slice(first, last - first)
    return len(array) + (_count(inner) if inner is not None else 0)


def to_rows(part: pa.RecordBatch) -> list[dict[str, Any]] | None:
    """The rows of a part in Python; None where they are too large together. Raises `ERRORS`."""
    plain = _plain_schema(part.schema)
    if plain != part.schema:
        with bounded_memory(MEMORY):
            part = part.cast(plain)
    size, values = part.nbytes, sum(map(_count, part.columns))
    if size <= MAX_BATCH and values <= MAX_VALUES * part.num_columns:
        return part.to_pylist()
    if part.num_rows > 1:
        return None
    if size > MAX_BATCH:
        raise Refused(f"a row of {size:,} bytes, more than {MAX_BATCH:,}")
    raise Refused(f"a row of {values:,} values, more than {MAX_VALUES:,}")
