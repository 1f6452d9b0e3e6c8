"""The fast part of `make faults`: every writer struck at some of its calls, damaged, and left by a loss of power."""

import errno
import json
import random
from functools import partial
from pathlib import Path

import flips
import fuzz
import guarantees
import guards
import powerloss
import pytest
import syscalls
import writers

from benchmarks.kills import Trials

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    writers.prepare()


@pytest.mark.parametrize("kind", writers.STEPS)
def test_a_loss_of_power_leaves_nothing_torn_and_nothing_published_is_lost(kind: str, tmp_path: Path) -> None:
    found = powerloss.record(partial(writers.write, kind), tmp_path)
    assert powerloss.bad_states(found, 400, 0) == 0
    assert powerloss.bad_states(found, 400, 0, files=False) > 0
    assert powerloss.bad_states(found, 400, 0, folders=False) > 0


@pytest.mark.parametrize("kind", flips.READERS)
def test_a_bit_or_a_cut_anywhere_is_told_by_the_file(kind: str, tmp_path: Path) -> None:
    assert flips.unnoticed(flips.artefact(kind, tmp_path), flips.READERS[kind], flips=60, cuts=10) == []


@pytest.mark.parametrize("kind", writers.STEPS)
def test_a_writer_that_is_struck_once_is_safe_and_goes_on_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    trials, rng = Trials(writers.STEPS[kind], tmp_path, strict=False), random.Random(0)
    calls = range(len(trials.calls))
    assert [problem for point in rng.sample(trials.points(), 2) if (problem := trials.kill_at(*point))] == []
    assert [problem for at in rng.sample(calls, 1) if (problem := trials.fail_at(at, errno.EIO))] == []


@pytest.mark.parametrize("kind", writers.STEPS)
def test_a_last_byte_that_is_not_written_is_noticed(kind: str, tmp_path: Path) -> None:
    """Below Python too: what C keeps in a buffer is written when the file is closed, where an error is easily lost."""
    trials = Trials(writers.STEPS[kind], tmp_path, strict=False)
    with trials.folder() as folder:
        trials.work(folder)
        largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert trials.limit_files(largest - 1) == ""


@pytest.mark.skipif(not syscalls.can_trace(), reason="needs strace")
@pytest.mark.parametrize("kind", ["shards", "pictures"])
def test_a_system_call_that_is_struck_is_safe(kind: str, tmp_path: Path) -> None:
    trials, rng = Trials(writers.STEPS[kind], tmp_path, strict=False), random.Random(0)
    system = syscalls.Syscalls(trials, tmp_path)
    last = [call for call in system.points if call.name in ("write", "pwrite64")][-1]
    assert [problem for call in (*rng.sample(system.points, 1), last) if (problem := system.kill(call))] == []
    assert system.fail(last, errno.ENOSPC) == ""


@pytest.mark.parametrize("border", fuzz.BORDERS)
def test_damaged_input_is_used_or_refused_in_one_line(border: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "LIMIT", 100)  # seconds on a busy machine; the long run holds them to ten
    count, failures = fuzz.fuzz(border, {"params": 12, "models": 6, "bombs": 12}.get(border, 100), random.Random(0), tmp_path)
    assert count >= 6
    assert failures == []


def test_the_guards_that_are_taken_out_are_there() -> None:
    assert len(guards.GUARDS) >= 30
    assert [guard for guard in guards.GUARDS if guard.text not in (ROOT / guard.file).read_text(encoding="utf-8")] == []
    assert [guard for guard in guards.GUARDS if not (ROOT / guard.tests.split()[0]).exists()] == []


def test_the_page_of_guarantees_has_the_figures_of_the_file() -> None:
    text = guarantees.PAGE.read_text(encoding="utf-8")
    assert guarantees.page(json.loads(guarantees.FIGURES.read_text(encoding="utf-8")), text) == text
