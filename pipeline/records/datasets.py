"""A data set as params.yaml names it -> its records and pictures, bad rows dealt with as `data.on_error` says.

Every stage that reads a data set opens it here, so all of them see, and refuse, the same rows.
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from pipeline.core import BAD_ROWS, PipelineError, final_name
from pipeline.params import Data, Dataset, HeldOut, Part
from pipeline.records.formats import Columns, Digests, Mixture, RowPolicy, Source, SourceSpec, Split, open_source, readable
from pipeline.records.formats.detect import expand
from pipeline.records.formats.split import Side, is_held_out
from pipeline.records.images import FORBIDDEN, leads_out
from pipeline.records.record import Record


def open_dataset(dataset: Dataset, *, limit: int = 0) -> Source | Mixture:
    """The data set's source. Pictures within the rows are meant by `images` being the same as `records`.

    Args:
        limit: the first records only, of each part of a mix; 0 = all.

    Raises `PipelineError` for a pattern that meets no file, or a file that two of them meet.
    """
    if dataset.mix is None:
        if glob.has_magic(dataset.records) and not os.path.exists(dataset.records) and dataset.format != "hub":
            raise PipelineError("a pattern, expected a path that DVC can watch", where=dataset.records, remedy=_PATTERN)
        return open_source(_spec(dataset, dataset.records, Part(), limit), seed=dataset.seed)
    if not os.path.isdir(dataset.records):
        raise PipelineError("no such folder, and its mix is of files below it", where=dataset.records, remedy=_PATTERN)
    specs, owner = [], dict[str, str]()
    for pattern, part in dataset.mix.items():
        files = _matched(dataset.records, pattern, dataset.links)
        for file in files:
            if file in owner:
                what = f"is met by {owner[file]!r} and by {pattern!r}"
                raise PipelineError(what, where=file, remedy="let one pattern of data.*.mix meet a file")
            owner[file] = pattern
        specs.append(replace(_spec(dataset, tuple(files), part, limit), name=os.path.join(dataset.records, pattern)))
    return open_source(specs, seed=dataset.seed)


_PATTERN = "set data.*.records to a folder and name patterns below it in data.*.mix"


def _matched(folder: str, pattern: str, links: str) -> list[str]:
    try:
        files = expand(os.path.join(glob.escape(folder), pattern))
    except PipelineError as error:
        raise PipelineError(error.what, where=os.path.join(folder, pattern), remedy="correct data.*.mix") from None
    if out := next((file for file in files if links == "refuse" and leads_out(file, folder)), None):
        raise PipelineError("a link that leads out of the data set's folder", where=out, remedy=FORBIDDEN)
    return files


def _spec(dataset: Dataset, records: str | tuple[str, ...], part: Part, limit: int) -> SourceSpec:
    """What the part says, and where it says nothing what the data set says."""
    within, columns = dataset.images == dataset.records, dataset.columns if part.columns is None else part.columns
    return SourceSpec(
        records,
        images=os.path.join(dataset.images, part.images) if part.images else "" if within else dataset.images,
        format=part.format or dataset.format,
        columns=Columns(**{**columns.model_dump(), "ignore": tuple(columns.ignore)}),
        prompt=dataset.prompt if part.prompt is None else part.prompt,
        unplaced=part.unplaced or dataset.unplaced,
        limit=limit,
        links=dataset.links,
        weight=part.weight,
    )


def no_pictures(where: str) -> PipelineError:
    """The error of a data set that trains the projector and shows it nothing."""
    remedy = "name rows with pictures there; rows of text alone belong in data.sft, trained with sft.train: all"
    return PipelineError(
        "no row shows a picture: the projector has nothing to learn from", where=where, remedy=remedy, code=BAD_ROWS
    )


def side_of(heldout: HeldOut, *, trained: bool) -> Side | None:
    """Which of a data set's rows are used: those that are not held out to train on, the others to measure; None = all."""
    if not heldout.share:
        return None
    return "train" if trained else "heldout"


def picture_is_used(heldout: HeldOut, *, trained: bool) -> Callable[[bytes], bool]:
    """For one data set: whether a picture (its SHA-256) can stand in a row that is used."""
    side = side_of(heldout, trained=trained)
    share, seed = heldout.share, heldout.seed
    return lambda key: side is None or is_held_out(key, share=share, seed=seed) == (side == "heldout")


def measured_rows(dataset: Dataset, source: Source | Mixture) -> Iterator[Record]:
    """The records to measure on: whose pictures can be decoded, on the held-out side where params deal rows out."""
    digests, rows = Digests(source.images), source.records()
    if isinstance(dataset, HeldOut) and dataset.share:
        rows = Split(digests, share=dataset.share, seed=dataset.seed).records(rows, "heldout")
    return (row for row in readable(rows, digests.digest_of_decodable) if isinstance(row, Record))


@contextmanager
def row_policy(source: Source | Mixture, data: Data, *, rejected: Path | None = None) -> Iterator[RowPolicy]:
    """A policy for the rows of a source; at the end the share of bad ones is checked.

    Args:
        rejected: a CSV table of the bad rows: file, row, reason, remedy.

    Raises `PipelineError` that lists the first ten bad rows and counts all, when there are more than params allow.
    """
    with RowPolicy(data.on_error, data.max_bad_share, table=rejected) as policy:
        yield policy
        policy.finish(where=str(source.images.path))
        if policy.bad:
            where = f" ({final_name(str(rejected))})" if rejected else ""
            print(f"{source.images.path}: {policy.bad:,} of {policy.good + policy.bad:,} rows left out{where}", flush=True)


@contextmanager
def good_rows(source: Source | Mixture, data: Data, *, rejected: Path | None = None) -> Iterator[Iterator[Record]]:
    """The records of a source, in order, whatever their pictures are; bad rows are `row_policy`."""
    with row_policy(source, data, rejected=rejected) as policy:
        yield policy.keep(source.records())
