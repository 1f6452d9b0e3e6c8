"""A talk on disk, a line or a paragraph an answer: JSON lines or Markdown, by the file's suffix. Only ever added to."""

import json
from pathlib import Path
from typing import IO

from pipeline.core import PipelineError

SUFFIXES = (".jsonl", ".md")


class Transcript:
    """Raises `PipelineError` for another suffix, or a file that cannot be written, before anything is asked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.suffix.lower() not in SUFFIXES:
            raise PipelineError("a transcript is .jsonl or .md", where=str(path), remedy="--save talk.md")
        try:
            self._file: IO[str] = path.open("a", encoding="utf-8", errors="replace")
        except (OSError, ValueError) as error:
            raise PipelineError(
                f"cannot be written: {getattr(error, 'strerror', None) or error}", where=str(path), remedy="give another --save"
            ) from None
        self._topic = 0

    def add(self, pictures: list[str], question: str, answer: str, *, new_topic: bool = False, **more: object) -> None:
        """One answer; it is in the file when this returns."""
        self._topic += new_topic
        if self.path.suffix.lower() == ".jsonl":
            row = {"topic": self._topic, "pictures": pictures, "question": question, "answer": answer, **more}
            text = json.dumps(row, ensure_ascii=False) + "\n"
        else:
            shown = "".join(f"![{Path(name).name}](<{name}>)\n\n" for name in pictures)
            text = f"{'---' if new_topic else ''}\n\n{shown}**{question}**\n\n{answer}\n"
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            raise PipelineError(f"cannot be written: {error.strerror}", where=str(self.path), remedy="free some space") from None

    def close(self) -> None:
        """What was said is in the file already."""
        self._file.close()
