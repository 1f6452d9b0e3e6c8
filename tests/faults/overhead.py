"""What checksums cost: the share of each stage's processor time that goes into them, on the whole embedded world.

Processor time and not a clock, so that others on the machine do not decide. It counts files verified and signed, seals and rows of
shards, and the frozen weights looked at before and after training.
"""

import json
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import stage_kills

from benchmarks.kills import run
from pipeline.core import checksums
from pipeline.features.store import shards, store
from pipeline.params.reading import override, read_yaml
from pipeline.vlm.model import freezing

CHECKS = ((checksums, "file_digest"), (shards, "_digest"), (store.ShardSet, "_verify"), (freezing, "weights_digest"))


class Overhead:
    """Runs the stages one after the other, each once, in processes of their own."""

    def __init__(self, scratch: Path, root: Path) -> None:
        self._folder, self._told, self._shares = scratch / "project", scratch / "seconds.json", list[float]()
        stage_kills.project(self._folder, root)
        content = read_yaml(root / "params.yaml")
        override(content, ["runtime.device=cpu"])
        (self._folder / "params.yaml").write_text(json.dumps(content), encoding="utf-8")

    def share(self, number: int) -> float:
        """Of stage `number`; those before it are run first where they have not been."""
        while len(self._shares) <= number:
            self._shares.append(self._run(stage_kills.STAGES[len(self._shares)]))
        return self._shares[number]

    def _run(self, name: str) -> float:
        shutil.rmtree(self._folder / "models" / name, ignore_errors=True)
        ended = run(partial(_measured, partial(stage_kills.stage, name, self._folder), self._told), limit=6 * stage_kills.LIMIT)
        if ended.code:
            raise RuntimeError(f"{name} ends with {ended.code}: {ended.text[-300:]}")
        return round(json.loads(self._told.read_text(encoding="utf-8")) / ended.seconds, 5)


def _measured(job: Callable[[], None], told: Path) -> None:
    """Run `job` and leave behind the processor seconds that checksums took in it, in whatever thread."""
    taken: list[float] = []

    def timed(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            began = time.thread_time()
            try:
                return plain(*arguments, **options)
            finally:
                taken.append(time.thread_time() - began)

        return call

    for owner, name in CHECKS:
        setattr(owner, name, timed(getattr(owner, name)))
    try:
        job()
    finally:
        told.write_text(json.dumps(sum(taken)), encoding="utf-8")
