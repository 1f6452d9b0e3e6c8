"""The four stages killed at random moments, each kill followed by the same command: the outputs are those of an undisturbed run.

An undisturbed run is `python -m stages.NAME` in a process of its own, in a folder with the embedded world's data cut to a few
rows. What is killed, and what then goes on, are processes forked from this one with the libraries loaded, so a kill costs a
second or two and falls into the stage's own work. A trial starts from what the stage before has left.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from benchmarks.kills import Ended, contents, run
from pipeline.core import quiet_libraries
from pipeline.params.reading import override, read_yaml

STAGES = ("extract", "tokenize", "pretrain", "sft")
OUTPUTS = ("data/features", "data/features_meta", "data/features_rejected.csv", "data/tokens", "models", "results")
SMALL = [
    "data.limit=16", "evaluate.limit=4", "evaluate.max_new_tokens=2", "pretrain.epochs=1", "sft.epochs=1", "pretrain.batch_size=4",
    "sft.batch_size=4", "runtime.save_minutes=0", "runtime.workers=2", "runtime.device=cpu", "vision.shard_rows=8",
    "runtime.extract_batch=4",
]  # fmt: skip
LIMIT = 600  # seconds for one run of a stage


def project(folder: Path, root: Path) -> None:
    """A folder that looks like the project's, its data the embedded world's."""
    content = read_yaml(root / "params.yaml")
    override(content, SMALL)
    (folder / "data").mkdir(parents=True)
    (folder / ".dvc").mkdir()
    (folder / "params.yaml").write_text(json.dumps(content), encoding="utf-8")
    shutil.copy(root / "dvc.yaml", folder / "dvc.yaml")
    for name in ("easyvqa", "models"):
        (folder / "data" / name).symlink_to(root / "data" / name)


def alone(name: str, folder: Path, root: Path) -> None:
    """A stage as a user runs it."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"stages.{name}"]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", timeout=LIMIT)
    if ended.returncode:
        raise RuntimeError(f"{name} ends with {ended.returncode}: {ended.stderr[-500:]}")


def stage(name: str, folder: Path, *, modules: Path | None = None) -> None:
    """A stage in this process, which has been forked for it; `modules`: where the names of all that it has loaded go."""
    os.chdir(folder)
    sys.argv[:] = [name]
    torch.set_num_threads(1)  # makes torch's pool anew; left to the threads that load weights, one finds it half made
    try:
        importlib.import_module("stages.run").run_stage(name, importlib.import_module(f"stages.{name}").main)
    finally:
        if modules:
            modules.write_text("\n".join(sys.modules), encoding="utf-8")


class StageKills:
    """The project after each stage (`after[0]`: before any), and the processor time that each takes when it is forked."""

    def __init__(self, scratch: Path, root: Path) -> None:
        quiet_libraries()
        self._scratch, self.after, self.seconds = scratch, [scratch / "after-0"], list[float]()
        project(self.after[0], root)
        for number, name in enumerate(STAGES):
            self.after.append(self.copy(self.after[number], scratch / f"after-{number + 1}"))
            alone(name, self.after[-1], root)
            run(
                partial(stage, name, self.copy(self.after[number], self._scratch / "trial"), modules=scratch / "modules"),
                limit=LIMIT,
            )
            _load(scratch / "modules")
            folder = self.copy(self.after[number], self._scratch / "trial")
            ended = run(partial(stage, name, folder), limit=LIMIT)
            if problem := self.judge(f"{name} in a fork", ended, folder, number):
                raise RuntimeError(problem)
            self.seconds.append(ended.seconds)

    def copy(self, source: Path, target: Path) -> Path:
        """One of `after`, in a place of its own."""
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, symlinks=True)
        return target

    def kill(self, number: int, share: float) -> str:
        """Kill a stage when this share of its time is over, then run it again; what is wrong, or nothing."""
        name = STAGES[number]
        while True:
            folder = self.copy(self.after[number], self._scratch / "trial")
            ended = run(partial(stage, name, folder), kill_after=share * self.seconds[number], limit=LIMIT)
            if ended.code != 0:
                break
            share *= 0.7  # it was quicker: another one dies earlier
        what = f"{name} killed after {share:.0%} of its time"
        if ended.code != -signal.SIGKILL:
            return f"{what}: ended with {ended.code}: {ended.text[-300:]!r}"
        return self.judge(what, run(partial(stage, name, folder), limit=LIMIT), folder, number)

    def judge(self, what: str, again: Ended, folder: Path, number: int) -> str:
        """What is wrong with a run that went on to the end of a stage."""
        if again.code:
            return f"{what}: the same command ends with {again.code}: {again.text[-300:]!r}"
        if other := sorted({name for name, *_ in _outputs(folder) ^ _outputs(self.after[number + 1])}):
            return f"{what}: these differ: {', '.join(other)}"
        left = [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]
        return f"{what}: left behind: {', '.join(left)}" if left else ""


def _load(modules: Path) -> None:
    """Load libraries that a stage has loaded, so that forks from now on have them."""
    for name in modules.read_text(encoding="utf-8").split("\n"):
        if name != "__main__":
            with suppress(Exception):
                importlib.import_module(name)


def _outputs(folder: Path) -> set[tuple[str, int, bytes]]:
    return {entry for entry in contents(folder) if entry[0].startswith(OUTPUTS)}
