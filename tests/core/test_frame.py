"""Whatever happens inside a command: one line, an exit code, an end."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAME = "from pipeline.core.frame import run_command\n"


def command(body: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A process that runs `body`, a function `work` among it, in the frame."""
    code = f"{FRAME}{body}\nrun_command(work)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, stderr=subprocess.PIPE, text=True, timeout=60, **options
    )  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("TypeError('x')", 1, "unexpected TypeError: x -> this is a defect of the program; GLANCE_DEBUG=1 shows the traceback"),
        ("RecursionError('too deep')", 1, "unexpected RecursionError"),
        ("AssertionError()", 1, "unexpected AssertionError"),
        ("MemoryError()", 5, "out of memory: MemoryError -> close other programs"),
        ("RuntimeError('[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: cannot')", 5, "out of memory"),
        ("RuntimeError('CUDA out of memory. Tried to allocate 2 GiB')", 5, "out of memory"),
        ("OSError(28, 'No space left on device', 'a/b')", 5, "a/b: No space left on device -> free space"),
        ("OSError(24, 'Too many open files', 'a')", 5, "ulimit -n"),
        ("ConnectionResetError(104, 'Connection reset by peer')", 5, "Connection reset by peer -> GLANCE_DEBUG=1 shows where"),
        ("KeyboardInterrupt()", 130, "interrupted: run the same command to go on"),
    ],
)
def test_any_exception_is_one_line_and_an_exit_code(raised: str, code: int, said: str) -> None:
    done = command(f"def work(): raise {raised}")
    assert done.returncode == code
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("way", ["--debug", "GLANCE_DEBUG"])
def test_the_traceback_is_there_for_who_asks(way: str) -> None:
    body = "import sys\ndef work(): assert '--debug' not in sys.argv; raise TypeError('x')"
    if way == "--debug":
        done = command(body, "a=1", way)
    else:
        done = command(f"import os; os.environ[{way!r}] = '1'\n{body}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "unexpected TypeError: x" in done.stderr.splitlines()[-1]


def test_a_reader_that_has_gone_ends_it_in_one_line() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = command("def work():\n for _ in range(99999): print('x')", stdout=writer)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == "error: standard output: was closed before the end\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("lines", [1, 99999])
def test_full_output_is_no_success(lines: int) -> None:
    with open("/dev/full", "w") as full:
        done = command(f"def work():\n for _ in range({lines}): print('x')", stdout=full)
    assert done.returncode == 5
    assert done.stderr == "error: standard output: cannot be written: No space left on device\n"


@pytest.mark.parametrize("shut", [">&- 2>&- <&-", "<&-"])
def test_with_closed_streams_no_file_takes_their_place(tmp_path: Path, shut: str) -> None:
    body = f"import os\ndef work():\n f = open({str(tmp_path / 'a')!r}, 'w'); os.write(1, b'stray'); f.write(str(f.fileno()))"
    code = f"{FRAME}{body}\nrun_command(work)"
    shell = f'exec "$0" -c "$1" {shut}'
    done = subprocess.run(["bash", "-c", shell, sys.executable, code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert done.returncode == 0
    assert int((tmp_path / "a").read_text()) > 2


def test_a_thread_that_hangs_in_a_read_does_not_keep_a_failed_run() -> None:
    body = """
from contextlib import closing
from pipeline.core.prefetch import prefetch
def work():
    with closing(prefetch(["pipe"], lambda job: os.read(os.pipe()[0], 1), where=str)) as made:
        next(made)
"""
    began = time.monotonic()
    done = command(f"import os; os.environ['GLANCE_PATIENCE'] = '0.5'\n{body}")
    assert time.monotonic() - began < 40
    assert done.returncode == 5
    assert done.stderr.startswith("error: pipe: reading it has stood still for 0.5 s")
    assert "GLANCE_PATIENCE" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_pipe_that_nobody_writes_to_is_refused_and_a_shell_s_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "params.yaml")
    body = "import sys\ndef work(): print(open(sys.argv[1]).read())"
    done = command(body, str(tmp_path / "params.yaml"))
    assert done.returncode == 5
    assert done.stderr == f"error: {tmp_path}/params.yaml: a pipe, expected a file\n"
    assert command(body, "/dev/stdin", input="words").stdout == "words\n"


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
@pytest.mark.parametrize("swallowed", [False, True])
def test_told_to_end_it_removes_what_it_was_writing(tmp_path: Path, number: str, code: int, swallowed: bool) -> None:
    body = f"""
import os, signal, time
from pathlib import Path
from pipeline.core import publish
class Lost:
    def __del__(self): os.kill(os.getpid(), signal.{number})
def work():
    with publish(Path({str(tmp_path / "page.html")!r})) as temporary:
        temporary.write_text("half")
        {"lost = Lost(); del lost" if swallowed else f"os.kill(os.getpid(), signal.{number})"}
        time.sleep(20)
"""
    done = command(body)
    assert done.returncode == code
    assert done.stderr == "interrupted: run the same command to go on\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["pipeline.params", "pipeline.chat", "stages.tokenize"])
def test_imports_that_are_interrupted_have_nothing_to_say(tmp_path: Path, module: str) -> None:
    strike = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\n"
    (tmp_path / "xxhash.py").write_text(strike)  # what all of them import
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == -2
    assert done.stderr == ""
