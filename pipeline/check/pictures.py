"""Every distinct picture of a data set, once: can it be read, is its header sound, does it decode, has another the same bytes?

Kept of each are two 64-bit digests, of its name and of its bytes. Pictures are decoded in threads, a bounded number ahead.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
import xxhash
from PIL import Image

from pipeline.check.counting import Keys, Spread
from pipeline.core import PipelineError, brief, prefetch
from pipeline.records import (
    FORMATS,
    BadRow,
    ImageError,
    Mixture,
    Record,
    Source,
    bad_record,
    check_size,
    decode,
    digest,
    unknown_kind,
)

SIDE = 160  # pixels of a thumbnail's longer side
SHOWN = 6  # pictures drawn of one row
SAMPLES, SAMPLE_BYTES = 16, 1 << 20  # files kept to measure the encoder on
REASONS = 1000  # names of bad pictures whose reason is kept for the rows that name them later


@dataclass(slots=True)
class PictureCounts:
    """What was found; `referenced` counts places in rows, all else distinct names."""

    referenced: int = 0
    distinct: int = 0
    missing: int = 0
    broken: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    widths: Spread = field(default_factory=Spread)
    heights: Spread = field(default_factory=Spread)
    contents: Keys = field(default_factory=Keys)
    samples: list[bytes] = field(default_factory=list)

    @property
    def sound(self) -> int:
        return self.distinct - self.missing - self.broken

    @property
    def duplicates(self) -> int:
        """Names whose bytes another name has too, one of each such group left out."""
        return self.sound - len(self.contents)


@dataclass(frozen=True, slots=True)
class _Job:
    name: str
    data: bytes | PipelineError | None  # None: read by the thread that decodes
    fresh: bool
    thumbnail: bool


@dataclass(frozen=True, slots=True)
class _Look:
    """What a thread found of one picture."""

    key: int = 0
    kind: str = ""
    size: tuple[int, int] = (0, 0)
    problem: tuple[str, str] | None = None  # reason and remedy: an error itself would hold the picture's bytes
    missing: bool = False
    thumbnail: str = ""
    sample: bytes = b""


class PictureCheck:
    """The pictures of one source, chunk by chunk.

    Args:
        whole: decode every picture; else only headers are checked, and thumbnails decoded.
        threads: that read and decode.
    """

    def __init__(self, source: Source | Mixture, *, whole: bool, threads: int) -> None:
        self.counts = PictureCounts()
        self._images, self._whole, self._threads = source.images, whole, threads
        self._within = _files_of_rows(source)
        self._names, self._bad = Keys(), Keys()
        self._reasons: dict[int, tuple[str, str]] = {}

    def check(self, records: Sequence[Record], drawn: set[int]) -> tuple[list[BadRow | None], dict[str, str]]:
        """For each record what is wrong with its pictures, and thumbnails (data URLs) by name for those at `drawn`."""
        keys = {
            name: xxhash.xxh3_64_intdigest(name.encode("utf-8", "surrogatepass")) for record in records for name in record.images
        }
        known = dict(zip(keys, self._names.has(_array(keys.values())).tolist(), strict=True))
        thumbnails: dict[str, str] = {}
        sound: list[_Look] = []
        bad: list[int] = []
        jobs = self._jobs(records, known, drawn)
        with closing(prefetch(jobs, self._look, depth=4 * self._threads, threads=self._threads, where=self._place)) as looked:
            for job, look in looked:
                if look.thumbnail:
                    thumbnails[job.name] = look.thumbnail
                if not job.fresh:
                    continue
                if look.problem is None:
                    sound.append(look)
                    continue
                self.counts.missing += look.missing
                self.counts.broken += not look.missing
                bad.append(keys[job.name])
                if len(self._reasons) < REASONS:
                    self._reasons[keys[job.name]] = look.problem
        self._note(sound)
        self.counts.referenced += sum(len(record.images) for record in records)
        self.counts.distinct += self._names.add(_array(keys.values()))
        self._bad.add(_array(bad))
        unusable = {name for name, found in zip(keys, self._bad.has(_array(keys.values())).tolist(), strict=True) if found}
        return [self._problem(record, unusable, keys) for record in records], thumbnails

    def _jobs(self, records: Sequence[Record], known: dict[str, bool], drawn: set[int]) -> Iterator[_Job]:
        """Pictures within rows are read here, in their order: a Parquet file goes back to the start of its row group."""
        begun: set[str] = set()
        for number, record in enumerate(records):
            for position, name in enumerate(record.images):
                fresh = not known[name] and name not in begun
                thumbnail = number in drawn and position < SHOWN
                if not fresh and not thumbnail:
                    continue
                begun.add(name)
                data: bytes | PipelineError | None = None
                if name.rpartition("#")[0] in self._within:
                    try:
                        data = self._images.read(name)
                    except PipelineError as error:
                        data = error
                yield _Job(name, data, fresh, thumbnail)

    def _place(self, job: _Job) -> str:
        return self._images.place(job.name)

    def _look(self, job: _Job) -> _Look:
        try:
            data = self._images.read(job.name) if job.data is None else job.data
        except PipelineError as error:
            data = error
        if isinstance(data, PipelineError):
            return _Look(problem=_said(data), missing=True)
        where = repr(job.name)
        try:
            kind, size = read_header(data, where=where)
            picture = decode(data, where=where) if self._whole or job.thumbnail else None
        except ImageError as error:
            return _Look(problem=_said(error))
        drawn = thumbnail(picture) if picture is not None and job.thumbnail else ""
        sample = data if len(self.counts.samples) < SAMPLES and len(data) <= SAMPLE_BYTES else b""
        return _Look(int.from_bytes(digest(data)[:8], "little"), kind, size, thumbnail=drawn, sample=sample)

    def _note(self, looks: list[_Look]) -> None:
        counts = self.counts
        counts.kinds.update(look.kind for look in looks)
        counts.widths.add([look.size[0] for look in looks])
        counts.heights.add([look.size[1] for look in looks])
        counts.contents.add(_array([look.key for look in looks]))
        counts.samples += [look.sample for look in looks if look.sample][: SAMPLES - len(counts.samples)]

    def _problem(self, record: Record, unusable: set[str], keys: dict[str, int]) -> BadRow | None:
        name = next((name for name in record.images if name in unusable), None)
        if name is None:
            return None
        reason, remedy = self._reasons.get(keys[name]) or _said(ImageError("cannot be used either", where=repr(name)))
        return bad_record(record, reason, remedy)


def read_header(data: bytes, *, where: str) -> tuple[str, tuple[int, int]]:
    """Kind ("JPEG RGB") and size in pixels, nothing decoded; raises `ImageError` whatever the decoder raised."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind, size = f"{image.format} {image.mode}", image.size
    except Exception as error:
        if data and str(error).startswith("cannot identify"):
            raise unknown_kind(data, where=where) from None
        what = f"not a picture that can be decoded: {brief(error)}" if data else "empty file"
        raise ImageError(what, where=where) from None
    check_size(size, where=where)
    return kind, size


def thumbnail(picture: Image.Image) -> str:
    """A small JPEG of an RGB picture, as a data URL."""
    picture = picture.copy()
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _said(error: PipelineError) -> tuple[str, str]:
    return f"{error.where}: {error.what}", error.remedy


def _files_of_rows(source: Source | Mixture) -> frozenset[str]:
    """What stands before the # in the names of pictures that are within rows."""
    if isinstance(source, Source):
        return frozenset(source.formats)
    return frozenset(f"{number}:{file}" for number, part in enumerate(source.sources) for file in part.formats)


def _array(keys: Iterable[int]) -> np.ndarray:
    return np.array(list(keys), np.uint64)
