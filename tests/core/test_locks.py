"""Locks end with their process, name it while it lives, and tell leftovers of the dead from work of the living."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from projects import with_path

from pipeline.core import locks
from pipeline.core.errors import BUSY, PipelineError
from pipeline.core.files import publish, publish_folder, remove_leftovers
from pipeline.core.locks import hold, is_held

ROOT = Path(__file__).parents[2]
HOLD = "from pathlib import Path; from pipeline.core.locks import hold\nwith hold('out', Path('locks')): "
WRITE = "from pathlib import Path; from pipeline.core.files import publish, publish_folder\nwith {0}(Path('out')) as t: "
WAIT = "print('ready', flush=True); import time; time.sleep(100)"


def started(code: str, folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": with_path(ROOT)}
    running = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "ready\n"
    return running


def test_a_second_run_names_the_first_and_may_begin_when_that_is_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = started(HOLD + WAIT, tmp_path)
    assert is_held("out", tmp_path / "locks")
    with pytest.raises(PipelineError) as caught, hold("out", tmp_path / "locks", patience=0.2):
        pytest.fail("it is held")
    assert caught.value.code == BUSY
    line = caught.value.line()
    assert line.startswith(f"out: is being written by process {first.pid} (")
    assert "-c" in line
    assert ", since 2" in line
    assert capsys.readouterr().err.count("waiting for process") == 1
    first.kill()
    first.wait()
    with hold("out", tmp_path / "locks", patience=0):
        assert is_held("out", tmp_path / "locks")
    assert not is_held("out", tmp_path / "locks")
    assert list((tmp_path / "locks").iterdir()) == []


def test_a_run_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    first = started(HOLD + WAIT.replace("100", "0.5"), tmp_path)
    with hold("out", tmp_path / "locks"):
        assert first.wait(timeout=10) == 0


def test_a_worker_that_outlives_its_killed_parent_holds_nothing(tmp_path: Path) -> None:
    code = HOLD + "\n import os, time\n if os.fork() == 0:\n  print('ready', flush=True)\n  time.sleep(5)\n time.sleep(100)"
    first = started(code, tmp_path)  # the child is there
    first.kill()
    first.wait()
    with hold("out", tmp_path / "locks", patience=0):
        pass


@pytest.mark.parametrize("name", ["publish", "publish_folder"])
def test_the_next_run_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path: Path, name: str) -> None:
    killed, living = (started(WRITE.format(name) + WAIT, tmp_path) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 2
    killed.kill()
    killed.wait()
    with (publish if name == "publish" else publish_folder)(tmp_path / "out") as mine:
        (mine / "x" if mine.is_dir() else mine).write_text("x")
        left = {path.name.split("@")[0] for path in tmp_path.iterdir()}
        assert left == {f".out.{os.getpid()}", f".out.{living.pid}"}
        remove_leftovers(tmp_path)
        assert mine.exists(), "one's own is alive too"
    living.send_signal(signal.SIGKILL)
    living.wait()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_leftover_is_known_by_its_lock_whatever_its_name_and_date_say(tmp_path: Path) -> None:
    for number, (process, host) in enumerate(((os.getpid(), locks.machine()), (1, locks.machine()), (1, "another"))):
        path = tmp_path / f".out{number}.{process}@{host}.tmp"
        path.write_text("")
        os.utime(path, (4e9, 4e9))
        (tmp_path / f".folder{number}.{process}@{host}.tmp/inner").mkdir(parents=True)
    for name in (".hidden", ".out.tmp", ".out.x@y.tmp", "out.1@y.tmp"):
        (tmp_path / name).write_text("a user's own")
    remove_leftovers(tmp_path, "out0")
    assert len(list(tmp_path.iterdir())) == 9
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hidden", ".out.tmp", ".out.x@y.tmp", "out.1@y.tmp"}


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF])
def test_without_locks_a_run_goes_on_with_one_warning_and_touches_nothing_of_the_living(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for process, host in ((dead.pid, locks.machine()), (os.getppid(), locks.machine()), (dead.pid, "another")):
        (tmp_path / f".out.{process}@{host}.tmp").write_text("")
    for _ in range(2):
        with hold("out", tmp_path / "locks", patience=0), publish(tmp_path / "out") as mine:
            mine.write_text("x")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", "locks", f".out.{os.getppid()}@{locks.machine()}.tmp", f".out.{dead.pid}@another.tmp"}
    assert capsys.readouterr().err.count("\n") == 1


def test_a_lock_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "locks").write_text("a file")
    with pytest.raises(PipelineError, match=r"locks/out\.lock: cannot be locked"), hold("out", tmp_path / "locks", patience=0):
        pass
