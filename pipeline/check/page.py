"""All reports as one HTML file that needs nothing else: no network, no scripts; whatever comes from the data is escaped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.check.counting import Spread
from pipeline.check.facts import Model, facts
from pipeline.check.survey import Report
from pipeline.core import publish, writing

WIDTH, HEIGHT, TOP, BOTTOM = 900, 220, 24, 26  # of the histogram, in its own units


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin: the bar's rectangle and what is written at it."""

    x: float
    y: float
    width: float
    height: float
    middle: float
    count: str
    label: str
    title: str
    long: bool  # beyond tokenize.max_tokens


def write_page(path: Path, reports: list[Report], model: Model, *, verdict: str, total: str) -> None:
    """Write the page, whole or not at all; raises `PipelineError` where it cannot be written."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    text = environment.get_template("page.html").render(
        verdict=verdict,
        total=total,
        stops=any(report.bad.count or not report.rows for report in reports),
        sections=[_section(report, model) for report in reports],
    )
    with publish(path) as temporary, writing(path):
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # a file's name may have half surrogates


def _section(report: Report, model: Model) -> dict[str, Any]:
    return {
        "title": report.subject.title,
        "records": report.subject.records,
        "facts": facts(report, model),
        "chart": _chart(report.lengths.lengths, model) if report.lengths.lengths.count else None,
        "bad": report.bad,
        "kinds": report.bad.kinds.most_common(),
        "examples": report.examples,
        "tokens": not model.problem,
    }


def _chart(spread: Spread, model: Model) -> dict[str, Any]:
    bins, base = list(spread.bins()), HEIGHT - BOTTOM
    highest, unit = max(count for _, _, count in bins), "letters" if model.problem else "tokens"
    step = WIDTH / max(len(bins), 6)
    bars = []
    for number, (first, last, count) in enumerate(bins):
        height = round((base - TOP) * count / highest, 1)
        span = f"{first:,}" if first == last else f"{first:,} – {last:,}"
        bars.append(
            Bar(
                x=round(number * step + 2, 1),
                y=round(base - height, 1),
                width=round(step - 4, 1),
                height=height,
                middle=round((number + 0.5) * step, 1),
                count=f"{count:,}",
                label=span if step > 90 else f"{first:,}",
                title=f"{span} {unit}: {count:,} rows",
                long=unit == "tokens" and last > model.limits.max_tokens,
            )
        )
    over = f"{model.limits.max_tokens:,}" if any(bar.long for bar in bars) else ""
    return {"unit": unit.capitalize(), "width": WIDTH, "height": HEIGHT, "base": base, "bars": bars, "over": over}
