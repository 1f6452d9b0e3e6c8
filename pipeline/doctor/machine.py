"""What runs here, and what the machine lacks."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.core import PipelineError
from pipeline.doctor.finding import Finding, megabytes, processes
from pipeline.params import load

SHARED = Path("/dev/shm")
ENOUGH = 1 << 28  # bytes that several GPUs' processes need to talk


def orphans(root: Path) -> Iterator[Finding]:
    """A stage whose parent is gone goes on writing outputs that the next run writes too."""
    for process, place in processes():
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        stage = next((word.decode() for word in words if word.startswith(b"stages.")), "")
        if stage and parent == 1 and process != os.getpid() and place == root.resolve():
            yield Finding(f"process {process} runs {stage} here and its parent is gone", f"kill {process}")


def shared_memory(root: Path) -> Iterator[Finding]:
    """Several processes of a stage exchange gradients through /dev/shm, of which a container has 64 MB unless told."""
    try:
        several = load(root / "params.yaml").runtime.processes > 1
    except PipelineError:  # told by another check
        return
    if several and SHARED.is_dir() and (size := shutil.disk_usage(SHARED).total) < ENOUGH:
        yield Finding(f"/dev/shm has {megabytes(size)}, runtime.processes is over 1", "docker run --shm-size 1g")
