"""The pre-flight of a run (`pipeline.check.preflight`) at the start of a stage, once for what it looks at.

What it says can stop a stage or be read, and changes no output: `dvc.yaml` lists neither it nor what it imports.
"""

import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from pipeline.core import PipelineError, fingerprint, main_checkout, publish
from pipeline.params import load, read_yaml


def run_preflight() -> None:
    """Print what is found; raises `PipelineError` where a fault is among it.

    What has passed is not looked at again until params, a model folder or Transformers change.
    """
    params, stamp = load(), main_checkout() / ".dvc" / "tmp" / "preflight"
    outs = [str(out) for stage in read_yaml(Path("dvc.yaml"))["stages"].values() for out in stage.get("outs", [])]
    encoders = [member.model for member in params.vision.members]
    models = [name for name in (*encoders, params.llm.model, params.sft.start) if name not in outs]
    key = fingerprint({"params": params.model_dump(mode="json"), "files": list(_files(models)), "with": version("transformers")})
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == key:
        return
    from pipeline.check.preflight import preflight

    found = preflight(params)
    faults = [finding for finding in found if not finding.note]
    for finding in found:
        if finding.note:
            print(f"note: {finding.line()}", flush=True)
    for finding in faults[:-1]:
        print(f"error: {finding.line()}", file=sys.stderr, flush=True)
    if faults:
        last = faults[-1]
        raise PipelineError(last.what, where=last.where, remedy=last.remedy)
    with publish(stamp) as temporary:
        temporary.write_text(key, encoding="utf-8")


def _files(models: list[str]) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of every file in the models' folders, and of what says what DVC makes."""
    paths = [Path("dvc.yaml"), Path("data/dvc.yaml"), *(path for model in models for path in sorted(Path(model).glob("*")))]
    for path in paths:
        if path.is_file():
            found = path.stat()
            yield str(path), found.st_size, found.st_mtime_ns
