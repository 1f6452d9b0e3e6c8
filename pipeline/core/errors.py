"""The one error type of the project.

Every mistake a user can make ends as one line on stderr: what is wrong, where, and what mends it (see `frame.py`).
"""

import re
from typing import Any

# Exit codes: DVC reports any failure as 255, so the line itself must tell; the codes serve scripts.
DEFECT, USAGE, BAD_ROWS, ARTEFACT, RESOURCE, BUSY, NUMERIC, INTERRUPTED = 1, 2, 3, 4, 5, 6, 7, 75

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_TEMPORARY = re.compile(r"\.([^/\s]+?)\.\d+@[^/\s]+?\.tmp")  # what `temporary_name` gives
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class PipelineError(Exception):
    """A problem the user can mend.

    Args:
        what: what is wrong, with expected and got.
        where: file, row or parameter it was found in.
        remedy: the parameter or command that mends it.
        code: exit code of the process (see the constants above).

    Attributes:
        figures: what a stage that fails has measured all the same, for its metrics.
    """

    figures: dict[str, Any] | None = None

    def __init__(self, what: str, *, where: str = "", remedy: str = "", code: int = USAGE) -> None:
        self.what, self.where, self.remedy, self.code = what, where, remedy, code
        super().__init__(self.line())

    def __reduce__(self) -> tuple[Any, ...]:
        """Worker processes send errors back: subclasses have other constructors, so none is called again."""
        return _rebuild, (type(self), self.args, self.__dict__)

    def line(self) -> str:
        """One line of text, control characters and memory addresses removed."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.remedy:
            text += f" -> {self.remedy}"
        return _ADDRESS.sub("", _CONTROL.sub(" ", final_name(text)))


def final_name(text: str) -> str:
    """A message in which files that are written under a temporary name have the one that they will have."""
    return _TEMPORARY.sub(r"\1", text)


def _rebuild(kind: type[PipelineError], args: tuple[Any, ...], state: dict[str, Any]) -> PipelineError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def brief(error: BaseException, *, limit: int = 160) -> str:
    """The first line of a library's error, short enough to quote in ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
