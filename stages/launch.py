"""A stage in several processes of this machine, one a GPU, under torch's own launcher.

`accelerate launch -m stages.sft` or `torchrun -m stages.sft` do the same from outside, on several machines too. The first
process speaks for all: what others print is kept, and shown when the failure is theirs.
"""

import logging
import os
import runpy
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.core import DEFECT, LAUNCHED, PipelineError, brief, debugging, die_with_parent

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SAID = LAUNCHED  # where the first process leaves its exit code
TO_SAVE = 300  # seconds that processes have to end by themselves when a signal asks them to


def launch(module: str, processes: int) -> NoReturn:
    """Run `python -m module` in so many processes; ends with the exit code of the one that failed by itself, else 0.

    All others then end too. A signal is passed on to them; the exit code is 130 for Ctrl-C and 128 + its number else.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    with tempfile.TemporaryDirectory(prefix="glance-") as folder:
        os.environ[SAID] = str(Path(folder) / "said")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            signals_to_handle="SIGTERM,SIGINT,SIGHUP",
            **_patience(LaunchConfig),
            logs_specs=DefaultLogsSpecs(folder, redirects=dict.fromkeys(range(1, processes), Std.ALL)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", __name__, module)
        except ChildFailedError as error:
            sys.exit(_report(error.failures, Path(folder)))
        except SignalException as error:
            sys.exit(130 if error.sigval == signal.SIGINT else 128 + int(error.sigval))
    sys.exit(0)


def _patience(config: type) -> dict[str, Any]:
    """`TO_SAVE` as an option of the launcher's config, where torch has it (from 2.12 on; before, processes have 30 seconds)."""
    return {"shutdown_timeout": TO_SAVE} if "shutdown_timeout" in config.__dataclass_fields__ else {}  # type: ignore[attr-defined]


def require_devices(processes: int, device: str) -> None:
    """Raises `PipelineError` where processes would have to share a GPU, or `device` is one of them that all would take."""
    import torch

    if device.startswith("cuda:"):
        raise PipelineError(f"runtime.device is {device} for {processes} processes", remedy="set runtime.device: cuda")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        found = torch.cuda.device_count()
        if processes > found:
            remedy = f"set runtime.processes: {max(1, found)}" if found else "set runtime.device: auto"
            raise PipelineError(f"runtime.processes is {processes}, GPUs are {found}: each process needs its own", remedy=remedy)


def _report(failures: "dict[int, ProcessFailure]", folder: Path) -> int:
    """Show what the process that failed by itself had to say, unless it stands there already; returns its exit code.

    When one is gone the others lose their connection to it, each with an error of its own. So an error that is told
    in one line, which is never that, goes before a process that was killed and before an unexpected error.
    """

    def order(rank: int) -> tuple[bool, bool, int]:
        failure = failures[rank]
        if failure.exitcode > 1:
            return False, False, rank  # of several with the same complaint the first process has been heard
        noticed = failure.timestamp - (failure.exitcode < 0)  # a kill up to a second after others have missed it
        return True, failure.exitcode == -signal.SIGTERM, noticed

    rank = min(failures, key=order)
    first = failures[rank]
    if first.exitcode < 0:
        raise PipelineError(
            f"process {rank + 1} was ended by {signal.Signals(-first.exitcode).name}",
            remedy="is memory short? lower micro_tokens, runtime.extract_batch or runtime.workers",
            code=128 - first.exitcode,
        )
    if first.exitcode == DEFECT:
        _tell_unexpected(rank, first.message)
    elif rank and _code_said(folder) != first.exitcode:  # else the first process has said the same, and was stopped before it ended
        said = [line for path in folder.glob(f"*/*/{rank}/stderr.log") for line in path.read_text().splitlines()]
        print("\n".join([line for line in said if line.startswith("error: ")] or said), file=sys.stderr, flush=True)
    return first.exitcode


def _tell_unexpected(rank: int, message: Any) -> None:
    """One line for an exception that no process has told: what it was, with `--debug` where it was, too."""
    if isinstance(message, dict) and debugging():
        print(message["extraInfo"]["py_callstack"], file=sys.stderr)
    what = brief(Exception(message["message"] if isinstance(message, dict) else message))
    remedy = "this is a defect of the program; --debug shows the traceback"
    print(f"error: {PipelineError(f'process {rank + 1}: unexpected {what}', remedy=remedy).line()}", file=sys.stderr, flush=True)


def _work(module: str) -> None:
    """Run the module as one of the processes; a traceback goes to the launcher, which shows it if it is the cause."""
    from torch.distributed.elastic.multiprocessing.errors import record

    die_with_parent()
    try:
        record(runpy.run_module)(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if os.environ.get("RANK") == "0" and SAID in os.environ:
            Path(os.environ[SAID]).write_text(str(error.code), encoding="utf-8")
        raise
    except Exception:
        sys.exit(DEFECT)


def _code_said(folder: Path) -> int | None:
    """The exit code with which the first process has ended by itself, what it had to say being said; None while it has not."""
    path = folder / "said"
    return int(path.read_text(encoding="utf-8")) if path.exists() and path.read_text(encoding="utf-8").isdigit() else None


if __name__ == "__main__":
    _work(sys.argv[1])
