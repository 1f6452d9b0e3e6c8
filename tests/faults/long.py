"""`make faults`: faults put into the real stages and writers by the hundred, and what came of them.

    python tests/faults/long.py [kills points diskfull power flips fuzz guards overhead]

Figures are counts, written to benchmarks/results/faults.json as they grow, with the machine and the commit. A section that was
ended goes on where it was, as long as the commit is the same; `sections` in the file says how far each has come, and what went
wrong. A number that was not reached stands as it is.
"""

import json
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import guarantees
import sections
import torch
import typer
from tqdm import tqdm

from benchmarks.figures import commit, record
from pipeline.core import quiet_libraries, run_command, write_json

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/faults.json"
EVERY = 15.0  # seconds between two writes of the figures
TOLD = 20  # problems that are kept


class Progress:
    """How far a section is, in the file of figures."""

    def __init__(self, results: Path, name: str, about: dict[str, Any]) -> None:
        self._results, self._name, self._about = results, name, {"commit": commit(), **about}
        before = self._all().get(name, {})
        same = all(before.get(key) == value for key, value in self._about.items())
        self.done = int(before["done"]) if same else 0
        self._figures = Counter(before["figures"] if same else {})
        self._problems = list(before["problems"] if same else [])
        self._written = time.monotonic()

    def _all(self) -> dict[str, Any]:
        return json.loads(self._results.read_text(encoding="utf-8")).get("sections", {}) if self._results.exists() else {}

    def add(self, found: sections.Found) -> None:
        self.done += 1
        self._figures.update(found.figures)
        for name, most in found.most.items():
            self._figures[name] = max(self._figures[name], most)
        for problem in found.problems:
            tqdm.write(problem)
        self._problems = [*self._problems, *found.problems][:TOLD]
        if time.monotonic() - self._written > EVERY:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        record(self._results, dict(self._figures))
        content = json.loads(self._results.read_text(encoding="utf-8"))
        mine = {**self._about, "done": self.done, "figures": dict(self._figures), "problems": self._problems}
        write_json(self._results, content | {"sections": {**content.get("sections", {}), self._name: mine}})


def main(
    names: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(sections.SECTIONS)}. Without: all.")] = None,
    amount: Annotated[int, typer.Option(min=0, help="Trials of a section; 0 = its own number.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random moments, bits and inputs.")] = 0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Put faults in, count what comes of them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process has none of the threads, and would wait for them
    quiet_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked process has one
    for name in names or list(sections.SECTIONS):
        with tempfile.TemporaryDirectory() as scratch:
            section = sections.SECTIONS[name](Path(scratch), ROOT, amount, seed)
            progress = Progress(results, name, {"of": section.trials, "amount": amount, "seed": seed})
            for number in tqdm(range(progress.done, section.trials), desc=name, mininterval=10, file=sys.stdout):
                progress.add(section.trial(number))
            progress.write()
            if results == guarantees.FIGURES:
                guarantees.write()
            print(name, json.loads(results.read_text(encoding="utf-8"))["sections"][name], flush=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
