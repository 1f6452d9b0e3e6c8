"""A data set as params.yaml names it -> its records and pictures, bad rows dealt with as `data.on_error` says.

Every stage that reads a data set opens it here, so all of them see, and refuse, the same rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.formats import Columns, RowPolicy, Source, SourceSpec
from pipeline.params import Data, Dataset
from pipeline.records import Record


def open_dataset(dataset: Dataset, *, limit: int = 0) -> Source:
    """The data set's source. Pictures within the rows are meant by `images` being the same as `records`."""
    return Source(
        SourceSpec(
            dataset.records,
            images="" if dataset.images == dataset.records else dataset.images,
            format=dataset.format,
            columns=Columns(**dataset.columns),
            prompt=dataset.prompt,
            unplaced=dataset.unplaced,
            limit=limit,
        )
    )


@contextmanager
def good_rows(source: Source, data: Data, *, rejected: Path | None = None) -> Iterator[Iterator[Record]]:
    """The rows of a source that can be used, in order; at the end the share of bad ones is checked.

    Args:
        rejected: a CSV table of the bad rows: file, row, reason, remedy.

    Raises `PipelineError` that lists the first ten bad rows and counts all, when there are more than params allow.
    """
    with RowPolicy(data.on_error, data.max_bad_share, table=rejected) as policy:
        yield policy.keep(source.records())
        policy.finish(where=str(source.spec.records))
        if policy.bad:
            where = f" ({rejected})" if rejected else ""
            print(f"{source.spec.records}: {policy.bad:,} of {policy.good + policy.bad:,} rows left out{where}", flush=True)
