"""A report in words: labelled lines that the terminal and the page both show."""

from collections import Counter
from dataclasses import dataclass

from pipeline.check.costs import Rate, Shape
from pipeline.check.counting import Spread
from pipeline.check.pictures import PictureCounts
from pipeline.check.survey import Report
from pipeline.params import Tokenize
from pipeline.records import Mixture


@dataclass(frozen=True, slots=True)
class Fact:
    """One line; `tone` is "" for a plain figure, "note" for what deserves a look, "bad" for what stops a run."""

    label: str
    text: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """What the figures are set against: the encoder's shape, the language model's context, and what is not known of them."""

    limits: Tokenize
    shape: Shape | None
    context: int | None
    problem: str = ""  # why there is no tokenizer
    factor: int = 1  # of projector: so many times so many patches are one token


def facts(report: Report, model: Model) -> list[Fact]:
    """Every line on one data set."""
    return [*_rows(report), *_pictures(report), *_lengths(report, model)]


def _rows(report: Report) -> list[Fact]:
    formats = Counter(kind for part in report.subject.parts() for kind in part.formats.values())
    good, bad = report.good, report.bad.count
    found = [Fact("format", ", ".join(f"{kind} ({count:,} file{'s' * (count > 1)})" for kind, count in formats.items()))]
    if isinstance(report.subject.source, Mixture):
        counts = report.subject.source.counts.items()
        found += [Fact("", f"{part}: {taken:,} rows taken of {rows:,}") for part, (rows, taken) in counts]
    if bad:
        found.append(Fact("rows", f"{report.rows:,}: {good:,} good, {bad:,} bad ({_percent(bad, report.rows)})", "bad"))
    else:
        found.append(Fact("rows", f"{report.rows:,}, all good" if report.rows else "none", "" if report.rows else "bad"))
    found += [
        Fact("", f"{file} cannot be read to its end: how many rows are lost is unknown", "bad") for file in report.bad.cut_short
    ]
    if good:
        turns = _spread(report.turns, "turns")
        roles = ", ".join(f"{report.roles[role]:,} {role}" for role in ("user", "assistant", "system") if report.roles[role])
        found.append(Fact("turns", f"{roles}; {turns}"))
    if spelled := report.lengths.spelled:
        found.append(Fact("", f"{spelled:,} rows have <image> in a system or assistant turn, where it is a word", "note"))
    if steering := report.lengths.steering:
        found.append(Fact("", f"{steering:,} rows spell a control token of the model; it is read as plain text", "note"))
    return found


def _pictures(report: Report) -> list[Fact]:
    counts, good = report.pictures, report.good
    found = []
    if good:
        parts = [("one picture", report.with_one), ("several", report.with_several), ("text only", report.without_pictures)]
        shares = ", ".join(f"{count:,} with {name} ({_percent(count, good)})" for name, count in parts if count)
        found.append(Fact("good rows", f"{shares}; {report.slots:,} <image> in all, a picture for each"))
    if not counts.referenced:
        return [*found, Fact("pictures", "none")]
    place = f", in {report.subject.images}" if report.subject.images else ""
    found.append(Fact("pictures", f"{counts.referenced:,} named in rows, {counts.distinct:,} distinct names{place}"))
    faults = [(counts.missing, "missing or unreadable"), (counts.broken, "broken")]
    found += [Fact("", f"{count:,} {name}", "bad") for count, name in faults if count]
    if not counts.missing and not counts.broken:
        found.append(
            Fact("", "all there, all decode" if report.whole else "all there, headers sound; not decoded (--headers-only)")
        )
    if counts.duplicates:
        found.append(
            Fact("", f"{counts.duplicates:,} have the same bytes as another: {len(counts.contents):,} are distinct", "note")
        )
    if counts.sound:
        found.append(Fact("sizes", _sizes(counts)))
        found.append(Fact("kinds", ", ".join(f"{kind} {count:,}" for kind, count in counts.kinds.most_common(8))))
    return found


def _sizes(counts: PictureCounts) -> str:
    wide, high = counts.widths, counts.heights
    if wide.smallest == wide.largest and high.smallest == high.largest:
        return f"{wide.largest:,}×{high.largest:,} pixels, all of them"
    medians = f"median {wide.quantile(0.5):,}×{high.quantile(0.5):,}"
    return f"{medians} pixels; width {wide.smallest:,} to {wide.largest:,}, height {high.smallest:,} to {high.largest:,}"


def _lengths(report: Report, model: Model) -> list[Fact]:
    counts, limits = report.lengths, model.limits
    if not counts.lengths.count:
        return []
    if model.problem:
        found = [Fact("letters", _spread(counts.lengths))]
        return [*found, Fact("", f"tokens are not counted: {model.problem}", "note")]
    each = f"; {model.shape.tokens // model.factor**2:,} stand for a picture" if model.shape and report.slots else ""
    found = [Fact("tokens", f"{counts.tokens:,}; {_spread(counts.lengths)}{each}")]
    context = f"; the model's context is {model.context:,}" if model.context else ""
    found.append(Fact("", f"tokenize.max_tokens is {limits.max_tokens:,}{context}"))
    if model.context and counts.lengths.above(model.context) and limits.max_tokens > model.context:
        over = counts.lengths.above(model.context)
        found.append(Fact("", f"{over:,} rows are longer than the model's context: lower tokenize.max_tokens to it", "bad"))
    if counts.cut or counts.refused:
        share = _percent(counts.cut + counts.refused, counts.lengths.count)
        text = f"{counts.cut:,} cut and {counts.refused:,} refused ({share}), tokenize.too_long is {limits.too_long}"
        found.append(Fact("too long", text, "note"))
        found += [Fact("", f"first refused: {counts.refused_first}", "note")] if counts.refused else []
    rows, tokens = _percent(counts.supervised_rows, counts.rows), _percent(counts.supervised, counts.tokens)
    found.append(Fact("supervised", f"{rows} of rows, {tokens} of tokens ({counts.supervised:,}): what the model learns to say"))
    return found


def cost(pictures: int, shape: Shape | None, rate: Rate | None) -> str:
    """What extracting so many distinct pictures takes."""
    if shape is None:
        return f"{pictures:,} distinct pictures; the encoder cannot be loaded, so their features' size is unknown"
    size = f"{pictures:,} × [{shape.tokens}, {shape.width}] {shape.storage} = {size_text(pictures * shape.row)}"
    if rate is None:
        return f"{size}; time unknown before the first extract"
    return f"{size}; about {seconds_text(pictures / rate.images)} at {rate.images:,.0f} pictures/s ({rate.source})"


def _spread(spread: Spread, unit: str = "") -> str:
    unit = f" {unit}" if unit else ""
    if spread.smallest == spread.largest:
        return f"{spread.largest:,}{unit} a row"
    return f"{spread.smallest:,} to {spread.largest:,}{unit} a row, median {spread.quantile(0.5):,}"


def _percent(part: int, whole: int) -> str:
    """Rounded, but never to 0 % or 100 % of what is not."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    if 99.9 < share < 100:
        return "> 99.9 %"
    return f"{share:.3g} %"


def size_text(count: int) -> str:
    """Bytes in words."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count / 1000:,.3g} kB"


def seconds_text(count: float) -> str:
    """Seconds in words."""
    if count < 100:
        return f"{max(1, round(count))} s"
    if count < 6000:
        return f"{count / 60:,.0f} min"
    return f"{count / 3600:,.1f} h"
