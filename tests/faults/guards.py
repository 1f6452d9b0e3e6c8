"""Guards taken out one at a time, in a copy of the sources: a test that is named with each must then fail, or run for ever.

A guard whose text is not found is an error of this list, not a guard that holds.
"""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from benchmarks.kills import Ended, run

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300  # seconds: a wait without an end is what some guards prevent


@dataclass(frozen=True, slots=True)
class Guard:
    """`text` of a `file` becomes `instead`; `tests`, a file and what to choose of it, are what should notice."""

    file: str
    text: str
    instead: str
    tests: str


POWER, FLIPS, FRAME, FILES, POOL = "tests/faults/test_faults.py -k power", "tests/faults/test_faults.py -k bit", "tests/core/test_frame.py", "tests/core/test_files.py", "tests/features/test_decoding.py"  # fmt: skip
GUARDS = [
    Guard("pipeline/core/disk.py", "            os.fsync(handle)\n", "            pass\n", POWER),
    Guard("pipeline/core/files.py", "            sync(temporary)\n            replace(", "            replace(", POWER),
    Guard("pipeline/core/files.py", "            replace(temporary, path)\n            sync(path.parent)\n    except", "            replace(temporary, path)\n    except", POWER),
    Guard("pipeline/core/files.py", "        sync(each.parent)\n", "        pass\n", POWER),
    Guard("pipeline/core/files.py", "        with suppress(OSError):\n            temporary.unlink()\n        release", "        release", FILES),
    Guard("pipeline/core/files.py", "if _names(error, temporary) else error", "if True else error", FILES),
    Guard("pipeline/core/files.py", "            raise _unwritable(path, error) from None\n        raise\n", "            raise\n        raise\n", FILES),
    Guard("pipeline/core/checksums.py", "if digest != entries[name][OWN]:", "if False:", FLIPS),
    Guard("pipeline/core/checksums.py", "if to_json(seal(plain)) != text:", "if False:", FLIPS),
    Guard("pipeline/features/store/shards.py", "    if _digest(path, place) != digest:", "    if False:", FLIPS),
    Guard("pipeline/features/store/shards.py", "        if xxhash.xxh3_64_intdigest(stored.data) != int(self._sums[row]):", "        if False:", "tests/features/test_crashes.py -k any_row"),
    Guard("pipeline/features/store/shards.py", "        if done != len(kept):", "        if False:", "tests/features/test_shards.py"),
    Guard("pipeline/features/store/store.py", "            if spec.get(key) != self.spec.get(key):", "            if False:", "tests/features/test_extraction.py"),
    Guard("pipeline/core/frame.py", "    if isinstance(error, OSError):\n        where", "    if False:\n        where", FRAME),
    Guard("pipeline/core/frame.py", "    if _is_lack_of_memory(error):", "    if False:", FRAME),
    Guard("pipeline/core/frame.py", "            _Output.failed = error\n", "", FRAME),
    Guard("pipeline/core/frame.py", "    for number in range(3):", "    for number in range(0):", FRAME),
    Guard("pipeline/core/prefetch.py", "        pool.shutdown(wait=False, cancel_futures=True)\n", "        pass\n", "tests/core/test_prefetch.py"),
    Guard("pipeline/core/processes.py", "        die_with_parent(signal.SIGKILL)\n", "", POOL),
    Guard("pipeline/features/decoder_pool.py", "            good += 1\n", "            good += good < 1\n", POOL),
    Guard("pipeline/records/decoder.py", "    if width * height > MAX_PIXELS:", "    if False:", "tests/records/test_images.py"),
    Guard("pipeline/vlm/training/optimizer.py", "    if math.isfinite(loss) and", "    if True or math.isfinite(loss) and", "tests/vlm/training/test_loop.py"),
    Guard("pipeline/records/formats/split.py", "            file.write(table.reshape(-1).data)\n", "            table.tofile(file)\n", "tests/faults/test_faults.py -k last"),
    Guard("pipeline/params/schema.py", 'extra="forbid"', 'extra="ignore"', "tests/params/test_params_bounds.py"),
    Guard("pipeline/records/images.py", "        if not stat.S_ISREG(found.st_mode):", "        if False:", "tests/records/test_links.py"),
    Guard("pipeline/records/formats/policy.py", "        if row.ends_file:", "        if False:", "tests/records/test_formats_together.py"),
    Guard("pipeline/doctor/dvc.py", "        if _md5(path) != path.parent.name + path.stem:", "        if False:", "tests/doctor"),
    Guard("pipeline/core/locks.py", "    if got:\n        return handle\n", "    return handle\n", "tests/core/test_locks.py"),
    Guard("pipeline/core/frame.py", "            if thread.is_alive():\n                _leave(code)", "            pass", FRAME),
    Guard("pipeline/core/prefetch.py", "future.result(timeout=limit)", "future.result()", FRAME),
    Guard("pipeline/features/decoder_pool.py", "        if job.tries >= TRIES:", "        if False:", POOL),
    Guard("pipeline/features/decoder_pool.py", "            elif worker.jobs and now - worker.since > limit:", "            elif False:", POOL),
    Guard("pipeline/features/decoder_pool.py", "        for job in jobs:\n            self._send(place, job)\n", "", POOL),
]  # fmt: skip


def take_out(guard: Guard, root: Path, copy: Path) -> str:
    """What is wrong: the guard is not found, its tests fail with it too, or nobody misses it; nothing when a test fails without it."""
    text = (root / guard.file).read_text(encoding="utf-8")
    if text.count(guard.text) < 1:
        return f"{guard.file}: {guard.text!r} is not there"
    if guard.tests not in _sound and (ended := _run(guard.tests, copy)).code:
        return f"{guard.tests}: fails with every guard in place: {ended.text[-300:]!r}"
    _sound.add(guard.tests)
    (copy / guard.file).write_text(text.replace(guard.text, guard.instead, 1), encoding="utf-8")
    try:
        ended = _run(guard.tests, copy)
        caught = ended.code in (1, -signal.SIGKILL)  # a test has failed, or waits for ever
        return "" if caught else f"{guard.file}: nobody misses {guard.text.strip()!r} (pytest: {ended.code})"
    finally:
        shutil.copy(root / guard.file, copy / guard.file)


_sound = set[str]()  # tests that pass as the code is


def _run(tests: str, copy: Path) -> Ended:
    """Those tests on the copied sources, in a fork of this process, which has the libraries loaded."""
    return run(partial(_test, tests, copy), limit=LIMIT)


def _test(tests: str, copy: Path) -> None:
    own = [name for name, module in sys.modules.items() if _is_ours(module)]
    for name in own:
        del sys.modules[name]
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path[:] = [str(copy), *(path for path in sys.path if not (Path(path) / "pipeline").is_dir() and "tests" not in path)]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *tests.split()])))


def _is_ours(module: object) -> bool:
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), "")
    return str(file).startswith(str(ROOT)) and "site-packages" not in str(file)


def copy_sources(root: Path, scratch: Path) -> Path:
    """The project's files without their history, in which guards are taken out."""
    names = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, names):
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, scratch / name)
    return scratch
