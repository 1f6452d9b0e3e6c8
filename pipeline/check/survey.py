"""One pass over a data set: rows, roles, pictures, lengths, examples; nothing is kept that grows with it but digests."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from pipeline.check.counting import BadRows, Spread
from pipeline.check.examples import Example, Examples, make_example
from pipeline.check.lengths import LengthCheck, LengthCounts
from pipeline.check.pictures import PictureCheck, PictureCounts
from pipeline.params import Tokenize
from pipeline.records import BadRow, ImageSlot, Mixture, Record, Source
from pipeline.text import Prompt, PromptBuilder

CHUNK = 256  # rows at a time


@dataclass(frozen=True, slots=True)
class Settings:
    """What all data sets are checked with; `builder` None where there is no tokenizer."""

    builder: PromptBuilder | None
    limits: Tokenize
    whole: bool  # decode every picture; else headers only
    examples: int  # rows drawn of each data set


@dataclass(frozen=True, slots=True)
class Subject:
    """A data set to check: what it is called, its rows and where its pictures are as the user named them, and its source."""

    title: str
    records: str
    images: str
    source: Source | Mixture

    def parts(self) -> list[Source]:
        return self.source.sources if isinstance(self.source, Mixture) else [self.source]


@dataclass(slots=True)
class Report:
    """What one data set holds. `rows` counts all; a row is bad, or good, and a good one may still be refused as too long."""

    subject: Subject
    whole: bool
    rows: int = 0
    bad: BadRows = field(default_factory=BadRows)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Spread = field(default_factory=Spread)
    slots: int = 0
    without_pictures: int = 0
    with_one: int = 0
    with_several: int = 0
    asking: int = 0  # rows whose user says something; the rest are captions
    pictures: PictureCounts = field(default_factory=PictureCounts)
    lengths: LengthCounts = field(default_factory=LengthCounts)
    examples: list[Example] = field(default_factory=list)

    @property
    def good(self) -> int:
        return self.rows - self.bad.count

    def add(self, chunk: Sequence[Record | BadRow], made: Sequence[Prompt | BadRow | None]) -> None:
        """Count rows in their order; `made` has, for each that reads well, a `BadRow` where it is bad all the same."""
        verdicts, turns = iter(made), []
        for row in chunk:
            verdict = row if isinstance(row, BadRow) else next(verdicts)
            self.rows += row.rows if isinstance(row, BadRow) else 1
            if isinstance(verdict, BadRow):
                self.bad.add(verdict)
            elif isinstance(row, Record):
                self._count(row)
                turns.append(len(row.turns))
        self.turns.add(turns)

    def _count(self, record: Record) -> None:
        self.roles.update(turn.role for turn in record.turns)
        self.slots += sum(isinstance(part, ImageSlot) for turn in record.turns for part in turn.parts)
        said = (part for turn in record.turns if turn.role == "user" for part in turn.parts if isinstance(part, str))
        self.asking += any(part.strip() for part in said)
        shown = len(record.images)
        self.without_pictures += not shown
        self.with_one += shown == 1
        self.with_several += shown > 1


def survey(subject: Subject, settings: Settings, progress: Callable[[int], object]) -> Report:
    """Read every row of a data set and every picture it names; raises `PipelineError` only for what no row can mend."""
    report = Report(subject, settings.whole)
    pictures = PictureCheck(subject.source, whole=settings.whole, threads=max(1, min(8, os.cpu_count() or 1)))
    lengths, examples = LengthCheck(settings.builder, settings.limits), Examples(settings.examples)
    report.pictures, report.lengths = pictures.counts, lengths.counts
    rows = subject.source.records()
    while chunk := list(islice(rows, CHUNK)):
        records = [row for row in chunk if not isinstance(row, BadRow)]
        drawn = examples.draw(len(records))
        problems, thumbnails = pictures.check(records, set(drawn))
        places = [place for place, problem in enumerate(problems) if problem is None]
        prompts = dict(zip(places, lengths.check([records[place] for place in places]), strict=True))
        made = [problem or prompts[place] for place, problem in enumerate(problems)]
        report.add(chunk, made)
        for place, example in drawn.items():
            prompt = made[place]
            if isinstance(prompt, BadRow) or (prompt is None and settings.builder is not None):
                continue  # bad or refused: the model will not see it
            examples.keep(example, make_example(records[place], prompt, settings.builder, thumbnails))
        progress(len(chunk))
    report.examples = examples.all()
    return report
