"""Peak memory of a process on its way through many rows: of `tokenize` as its stage runs it, and of `records check`."""

import time
from pathlib import Path

from benchmarks.tokenizing import PATCHES, open_rows
from pipeline.check.survey import Settings, Subject, survey
from pipeline.params.reading import load
from pipeline.records.formats import Source, SourceSpec
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import write_tokens
from pipeline.text.tokenization import Summary, tokenize

SHARES = (0.1, 0.5, 1.0)


class Peaks:
    """Takes the number of rows that have just been done; `found` is the peak in bytes when each share of them was."""

    def __init__(self, rows: int) -> None:
        self._marks, self._done = [int(share * rows) for share in SHARES], 0
        self.found: list[int] = []

    def __call__(self, count: int) -> None:
        self._done += count
        while len(self.found) < len(self._marks) and self._done >= self._marks[len(self.found)]:
            self.found.append(_peak())


def _peak() -> int:
    """Most memory this process has had so far, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def follow_tokenize(root: Path, rows: int) -> tuple[list[int], float]:
    """Peaks in bytes after each of `SHARES` of the rows of rows.jsonl, and rows a second."""
    source, builder, tokenizer = open_rows(root / "rows.jsonl", "data/models/llm")
    total, peaks = Summary(), Peaks(rows)
    began = time.perf_counter()
    batches = tokenize(source.records(), tokenizer, total, workers=2, progress=peaks)
    write_tokens(root / "rows.arrow", batches, builder.spec())
    rate = rows / (time.perf_counter() - began)
    assert total.rows == rows, f"{total.rows} rows of {rows}"
    (root / "rows.arrow").unlink()
    return peaks.found, rate


def follow_check(root: Path, rows: int) -> tuple[list[int], float]:
    """The same of `python -m pipeline.check` on rows.parquet, every picture decoded."""
    params, name, images = load(Path("params.yaml")), str(root / "rows.parquet"), str(root / "images")
    subject = Subject(name, name, images, Source(SourceSpec(name, images=images)))
    builder = PromptBuilder("data/models/llm", image_token="<image>", tokens=PATCHES)
    peaks, began = Peaks(rows), time.perf_counter()
    report = survey(subject, Settings(builder, params.tokenize, whole=True, examples=0), peaks)
    assert report.good == rows, f"{report.good} good rows of {rows}"
    return peaks.found, rows / (time.perf_counter() - began)
