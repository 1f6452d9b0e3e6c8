"""The four stages killed at random moments, each kill followed by the same command: the outputs are those of an undisturbed run.

The stages run as `python -m stages.NAME`, in a folder with the embedded world's data cut to a few dozen rows. A trial starts from
what the stage before has left. The first third of a run loads libraries, so kills fall into the rest.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.kills import Ended, contents
from pipeline.params.reading import override, read_yaml

STAGES = ("extract", "tokenize", "pretrain", "sft")
OUTPUTS = ("data/features", "data/features_meta", "data/features_rejected.csv", "data/tokens", "models", "results")
SMALL = [
    "data.limit=48", "evaluate.limit=16", "evaluate.max_new_tokens=4", "pretrain.epochs=1", "sft.epochs=1", "pretrain.batch_size=8",
    "sft.batch_size=8", "runtime.save_minutes=0", "runtime.workers=2", "runtime.device=cpu", "vision.shard_rows=16",
]  # fmt: skip


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


def run(name: str, folder: Path, root: Path, *, kill_after: float | None = None) -> Ended:
    """A stage in a process of its own, which is killed with -9 after so many seconds if it still runs."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        text, _ = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        text, _ = process.communicate()  # which ends when its helpers have ended, too
    return Ended(process.returncode, text, time.perf_counter() - began)


class StageKills:
    """The project after each stage (`after[0]`: before any), and how long each takes."""

    def __init__(self, scratch: Path, root: Path) -> None:
        self._scratch, self._root = scratch, root
        self.after, self.seconds = [scratch / "after-0"], list[float]()
        project(self.after[0], root)
        for number, name in enumerate(STAGES):
            folder = self._copy(self.after[number], f"after-{number + 1}")
            ended = run(name, folder, root)
            if ended.code:
                raise RuntimeError(f"{name} ends with {ended.code}: {ended.text[-500:]}")
            self.after.append(folder)
            self.seconds.append(ended.seconds)

    def _copy(self, source: Path, name: str) -> Path:
        target = self._scratch / name
        shutil.rmtree(target, ignore_errors=True)
        subprocess.run(["cp", "-a", str(source), str(target)], check=True)
        return target

    def kill(self, number: int, share: float) -> str:
        """Kill a stage when this share of its time is over, then run it again; what is wrong, or nothing."""
        name, expected = STAGES[number], _outputs(self.after[number + 1])
        while True:
            folder = self._copy(self.after[number], "trial")
            ended = run(name, folder, self._root, kill_after=share * self.seconds[number])
            if ended.code != 0:
                break
            share *= 0.7  # it was quicker: another one dies earlier
        what = f"{name} killed after {share:.0%} of its time"
        if ended.code != -signal.SIGKILL:
            return f"{what}: ended with {ended.code}: {ended.text[-300:]!r}"
        return _judge(what, run(name, folder, self._root), folder, expected)


def _judge(what: str, again: Ended, folder: Path, expected: set[tuple[str, int, bytes]]) -> str:
    if again.code:
        return f"{what}: the same command ends with {again.code}: {again.text[-300:]!r}"
    if other := sorted({name for name, *_ in _outputs(folder) ^ expected}):
        return f"{what}: these differ: {', '.join(other)}"
    left = [str(path.relative_to(folder)) for path in folder.rglob(".*.tmp")]
    return f"{what}: left behind: {', '.join(left)}" if left else ""


def _outputs(folder: Path) -> set[tuple[str, int, bytes]]:
    return {entry for entry in contents(folder) if entry[0].startswith(OUTPUTS)}


def random_kills(kills: StageKills, count: int, rng: random.Random) -> list[str]:
    """So many trials, the stages taking turns; what went wrong."""
    problems = [kills.kill(number % len(STAGES), rng.uniform(0.33, 1.0)) for number in range(count)]
    return [problem for problem in problems if problem]
