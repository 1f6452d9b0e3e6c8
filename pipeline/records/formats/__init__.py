"""Any real data set -> records: readers for the formats in use, chosen from a file's content, all streaming.

    source = open_source(SourceSpec("data/*.parquet"))
    for row in source.records():            # a pipeline.records.Record, or a BadRow that says what is wrong with it
        ...
    source.images.read(record.images[0])    # as pipeline.records.images.ImageRoot reads, also from within rows

`conversation` has the spellings, `row` what a reader gives, `policy` what bad rows cost, `split` the held-out part.
"""

from pipeline.records.formats.detect import FORMATS, detect
from pipeline.records.formats.keys import Columns
from pipeline.records.formats.policy import RowPolicy
from pipeline.records.formats.row import BadRow, Row
from pipeline.records.formats.rows import Rows
from pipeline.records.formats.source import Mixture, Source, SourceSpec, draw, open_source
from pipeline.records.formats.split import Digests, GoodImages, Split, readable

__all__ = [
    "FORMATS",
    "BadRow",
    "Columns",
    "Digests",
    "GoodImages",
    "Mixture",
    "Row",
    "RowPolicy",
    "Rows",
    "Source",
    "SourceSpec",
    "Split",
    "detect",
    "draw",
    "open_source",
    "readable",
]
