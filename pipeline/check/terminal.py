"""A report on the terminal: labelled lines, a histogram of bars, the first bad rows one a line."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.check.counting import Spread
from pipeline.check.facts import Fact, Model, facts
from pipeline.check.survey import Report
from pipeline.records import SHOWN

STYLES = {"": "", "note": "yellow", "bad": "bold red"}
BAR = 30  # letters
BROAD = 110  # letters a line where nobody looks: a file or a pipe


def open_console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=BROAD)


def show(console: Console, report: Report, model: Model) -> None:
    """One data set."""
    heading = Text(clean(report.subject.title), "bold")
    if report.subject.records != report.subject.title:
        heading.append(f"  {clean(report.subject.records)}", "dim")
    console.print(heading, soft_wrap=True)
    lines = facts(report, model)
    console.print(_table(lines))
    if report.lengths.lengths.count:
        console.print(_histogram(report.lengths.lengths, "letters" if model.problem else "tokens", model))
    show_bad(console, report)
    console.print()


def _table(lines: list[Fact]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=14, no_wrap=True)
    table.add_column(overflow="fold")
    for line in lines:
        table.add_row(line.label, Text(clean(line.text), STYLES[line.tone]))
    return table


def _histogram(spread: Spread, unit: str, model: Model) -> Table:
    bins = list(spread.bins())
    highest = max(count for _, _, count in bins)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", justify="right", min_width=14, no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    for number, (first, last, count) in enumerate(bins):
        long = unit == "tokens" and last > model.limits.max_tokens
        table.add_row(
            f"{unit} a row" if not number else "",
            Text(f"{first:,} to {last:,}" if last > first else f"{first:,}", "dim"),
            Text(f"{_bar(count, highest):{BAR}} {count:,}", "yellow" if long else "cyan"),
        )
    return table


def _bar(count: int, highest: int) -> str:
    eighths = -(-8 * BAR * count // highest)  # rounded up: one row is seen too
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def show_bad(console: Console, report: Report) -> None:
    """The first ten bad rows as `file:row: reason -> remedy`, one a line, and how many there are of each kind."""
    if not report.bad.count:
        return
    if report.bad.count > SHOWN:
        console.print(Text(f"  {report.bad.count:,} bad rows by kind:", "bold red"))
        for kind, count in report.bad.kinds.most_common(SHOWN):
            console.print(Text(f"  {count:>12,}  {clean(kind)}"), soft_wrap=True)
    shown = report.bad.first[:SHOWN]
    console.print(Text(f"  the first {len(shown)}:" if report.bad.count > len(shown) else "  bad rows:", "bold red"))
    for row in shown:
        console.print(Text(f"    {clean(row.line())}"), soft_wrap=True)


def clean(text: str) -> str:
    """What any terminal takes: no control characters, no half surrogates (a file's name may have them)."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else " " for letter in text)
