"""What bad rows cost: `stop` for any of them, or `skip` them, listed and counted, up to a share of all rows.

Whatever the policy, nothing is dropped in silence: rows in = records kept + rows listed, and a file that cannot be read to
its end stops the run, since nobody knows how much of it is missing.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pipeline.core import BAD_ROWS, PipelineError, temporary_name, writing
from pipeline.records.formats.row import BadRow
from pipeline.records.record import Record

SHOWN = 10
HEADER = ("file", "row", "rows", "reason", "remedy")
_QUOTED_IN_A_LINE = 200


class RowPolicy:
    """Keeps the good rows of one or more streams; as a context it also writes the bad ones to a CSV table.

    Args:
        on_error: "stop" keeps nothing behind the first bad row, but counts on to tell all there are; "skip" goes on.
        max_bad_share: with "skip", the share of all rows above which `finish` raises.
        table: where the bad rows go, header included, also when the run stops. None = nowhere.
    """

    def __init__(self, on_error: Literal["stop", "skip"], max_bad_share: float, *, table: Path | None = None) -> None:
        self._on_error, self._max_bad_share, self._table = on_error, max_bad_share, table
        self.good = self.bad = 0
        self.first: list[BadRow] = []
        self._stack = ExitStack()
        self._writer: Any = None

    def __enter__(self) -> "RowPolicy":
        if self._table is not None:
            with writing(self._table):
                self._table.parent.mkdir(parents=True, exist_ok=True)
                text = temporary_name(self._table).open("w", encoding="utf-8", errors="backslashreplace", newline="")
                self._writer = csv.writer(self._stack.enter_context(text), lineterminator="\n")
                self._writer.writerow(HEADER)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._table is None:
            return
        with writing(self._table):
            self._stack.close()
            os.replace(temporary_name(self._table), self._table)

    def keep(self, rows: Iterable[Record | BadRow]) -> Iterator[Record]:
        """The records among `rows`, in order; raises `PipelineError` behind the last row under "stop", and for a file that
        cannot be read to its end."""
        for row in rows:
            if isinstance(row, BadRow):
                self.reject(row)
                continue
            self.good += 1
            if not (self.bad and self._on_error == "stop"):
                yield row
        self._stop_if_asked()

    def reject(self, row: BadRow) -> None:
        """Count and list one bad row; raises `PipelineError` for the last row of a file that cannot be read to its end."""
        self.bad += row.rows
        if len(self.first) < SHOWN:
            self.first.append(row)
        if self._writer is not None:
            with writing(self._table or Path()):
                self._writer.writerow((row.file, row.row, row.rows, row.reason, row.remedy))
        if row.ends_file:
            raise PipelineError(row.reason, where=row.where, remedy=row.remedy, code=BAD_ROWS)

    def accept(self, rows: int) -> None:
        """Count good rows that did not go through `keep`."""
        self.good += rows

    def finish(self, *, where: str) -> None:
        """Raises `PipelineError` when nothing is left, or more rows are bad than allowed: both figures and the first ten."""
        self._stop_if_asked()
        rows = self.good + self.bad
        if not rows:
            raise PipelineError("no rows", where=where, remedy="set data.*.records", code=BAD_ROWS)
        if not self.good:
            raise self._too_many("mend them: no row is left")
        if self.bad > self._max_bad_share * rows:
            raise self._too_many(f"mend them, or raise data.max_bad_share, which is {self._max_bad_share:.1%}")

    def _stop_if_asked(self) -> None:
        if self.bad and self._on_error == "stop":
            raise self._too_many("mend or remove them, or set data.on_error to skip")

    def _too_many(self, remedy: str) -> PipelineError:
        rows = self.good + self.bad
        what = f"{self.bad:,} of {rows:,} rows are bad ({self.bad / rows:.1%}): {self.listing()}"
        return PipelineError(what, remedy=remedy, code=BAD_ROWS)

    def listing(self) -> str:
        """The first ten bad rows in one line."""
        return "; ".join(f"{row.where} ({_short(row.reason)})" for row in self.first)


def _short(text: str) -> str:
    return text if len(text) <= _QUOTED_IN_A_LINE else text[: _QUOTED_IN_A_LINE - 1] + "…"
