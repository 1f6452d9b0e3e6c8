"""Any real data set -> records: readers for the formats in use, chosen from a file's content, all streaming.

    source = open_source(SourceSpec("data/*.parquet"))
    for row in source.records():            # a pipeline.records.Record, or a BadRow that says what is wrong with it
        ...
    source.images.read(record.images[0])    # as pipeline.images.ImageRoot reads, also from within rows

`conversation` has the spellings, `row` what a reader gives, `policy` what bad rows cost, `split` the held-out part.
"""

from pipeline.formats.conversation import Columns
from pipeline.formats.detect import FORMATS, detect
from pipeline.formats.policy import RowPolicy
from pipeline.formats.row import BadRow
from pipeline.formats.source import Mixture, Source, SourceSpec, open_source
from pipeline.formats.split import Digests, GoodImages, Split, readable

__all__ = [
    "FORMATS",
    "BadRow",
    "Columns",
    "Digests",
    "GoodImages",
    "Mixture",
    "RowPolicy",
    "Source",
    "SourceSpec",
    "Split",
    "detect",
    "open_source",
    "readable",
]
