"""What a run took: seconds, memory, rates. They differ from run to run, so they stand apart from the figures of its result.

metrics/NAME.json, which git keeps, holds the result alone: a run that comes to the same leaves the work tree clean. What it
took lies in the main checkout under `.dvc/tmp/costs`, in a file named by the content of that metrics file. So any checkout,
experiment or commit with these figures finds it, and none finds what another run took.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.core.files import main_checkout, write_json

COSTS = frozenset({"seconds", "peak_memory_gb", "encoded", "images_per_second", "decode_ms", "waiting_share"})
FOLDER = Path(".dvc/tmp/costs")


def keep_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write a stage's figures to its metrics file at `path`, and what the run took aside."""
    write_json(path, {key: value for key, value in figures.items() if key not in COSTS})
    write_json(_place(path.read_bytes()), {key: value for key, value in figures.items() if key in COSTS})


def costs_of(metrics: bytes | None) -> dict[str, Any]:
    """What the last run with these figures took; empty where this checkout has not seen one. `metrics` is the file's content."""
    if metrics is None:
        return {}
    try:
        found = json.loads(_place(metrics).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    numbers = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in numbers if key in COSTS and isinstance(value, int | float)}


def _place(metrics: bytes) -> Path:
    return main_checkout() / FOLDER / f"{hashlib.sha256(metrics).hexdigest()[:32]}.json"
