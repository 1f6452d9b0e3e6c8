"""Any data set in, records out: a `Record` is one conversation with the names of its images, whatever file it came from.

formats    readers, chosen from a file's content          record     what a row becomes, and the rules it is held to
images     where pictures are, and their bytes            decoder    bytes -> pixels, for every stage
datasets   a data set as params.yaml names it, bad rows dealt with
`python -m pipeline.records repack` writes a Parquet file again in small row groups.
"""

from pipeline.records.datasets import good_rows, measured_rows, no_pictures, open_dataset, picture_is_used, row_policy, side_of
from pipeline.records.decoder import DECODER, FORMATS, check_size, decode, unknown_kind
from pipeline.records.formats import (
    BadRow,
    Columns,
    Digests,
    GoodImages,
    Mixture,
    Row,
    Rows,
    Source,
    SourceSpec,
    Split,
    draw,
    readable,
)
from pipeline.records.formats.array import JsonArray
from pipeline.records.formats.lines import JsonLines
from pipeline.records.formats.policy import SHOWN
from pipeline.records.formats.row import bad_record, too_many_rows
from pipeline.records.formats.split import Side
from pipeline.records.images import ImageError, ImageRoot, Images, as_arrow, digest, read_file
from pipeline.records.record import PLACEHOLDER, ImageSlot, Record, Turn, is_half_surrogate, load_json

__all__ = [
    "DECODER",
    "FORMATS",
    "PLACEHOLDER",
    "SHOWN",
    "BadRow",
    "Columns",
    "Digests",
    "GoodImages",
    "ImageError",
    "ImageRoot",
    "ImageSlot",
    "Images",
    "JsonArray",
    "JsonLines",
    "Mixture",
    "Record",
    "Row",
    "Rows",
    "Side",
    "Source",
    "SourceSpec",
    "Split",
    "Turn",
    "as_arrow",
    "bad_record",
    "check_size",
    "decode",
    "digest",
    "draw",
    "good_rows",
    "is_half_surrogate",
    "load_json",
    "measured_rows",
    "no_pictures",
    "open_dataset",
    "picture_is_used",
    "read_file",
    "readable",
    "row_policy",
    "side_of",
    "too_many_rows",
    "unknown_kind",
]
