"""What a benchmark leaves behind: figures by name in a JSON file, with the machine and the commit they come from.

Several benchmarks share one file, each with figures of its own: recording some leaves the others as they are.
"""

import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from pipeline.core.errors import ARTEFACT, PipelineError, brief
from pipeline.core.files import write_json


def hardware() -> str:
    """Processor, cores this process may use, memory, GPUs, system: what a figure depends on, and no machine's name."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parts = [_processor(), f"{cores} cores", f"{memory:.0f} GB", platform.system()]
    parts[3:3] = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return ", ".join(parts)


def _processor() -> str:
    """Its name, and family and model where there are such: clouds give generations of very different speed one name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    said = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+)$", text, re.MULTILINE))
    name = said.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= said.keys() else name


def commit() -> str:
    """Short hash of the commit this code is from, with `+` where a Python file differs from it; `unknown` without git."""
    name = _git("rev-parse", "--short", "HEAD")
    return f"{name}{'+' if _git('status', '--porcelain', '--', '*.py') else ''}" if name else "unknown"


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        found = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def read(path: Path) -> dict[str, Any]:
    """What `record` left at `path`, or an empty start; raises `PipelineError` for any other file."""
    if not path.exists():
        return {"figures": {}, "older": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found | {"figures": dict(found["figures"]), "older": dict(found.get("older", {}))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"not a file of benchmark figures: {brief(error)}"
        raise PipelineError(what, where=str(path), remedy="delete it", code=ARTEFACT) from None


def record(path: Path, figures: dict[str, Any]) -> None:
    """Merge `figures` into the file at `path`: `{"hardware", "commit", "figures": {name: value}, "older": {...}}`.

    `hardware` and `commit` are those of this call. Figures that an earlier call left and this one does not renew stay,
    and where they come from another commit or machine `older` says which. Raises `PipelineError` as `read` does.
    """
    found, here = read(path), {"hardware": hardware(), "commit": commit()}
    before = {key: found.get(key) for key in here}
    older = {name: found["older"].get(name, before) for name in found["figures"] if name not in figures}
    older = {name: source for name, source in older.items() if source != here}
    write_json(path, found | here | {"figures": found["figures"] | figures, "older": older})
