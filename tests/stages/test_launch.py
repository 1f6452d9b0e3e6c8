"""Before processes are started: each needs a GPU of its own."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.core.errors import PipelineError
from stages.launch import _report, require_devices


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_more_processes_than_gpus_are_refused_in_one_line_that_names_both_numbers(device: str) -> None:
    require_devices(2, device)
    with pytest.raises(PipelineError, match=r"runtime\.processes is 3, GPUs are 2.*set runtime\.processes: 2") as caught:
        require_devices(3, device)
    assert len(caught.value.line().splitlines()) == 1


@pytest.mark.usefixtures("two_gpus")
def test_one_gpu_by_number_is_no_place_for_several_processes() -> None:
    with pytest.raises(PipelineError, match=r"runtime\.device is cuda:1 for 2 processes.*set runtime\.device: cuda"):
        require_devices(2, "cuda:1")


@pytest.mark.usefixtures("two_gpus")
def test_processors_are_shared_by_any_number() -> None:
    require_devices(7, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_asked_for_and_absent_is_refused_before_the_launch() -> None:
    require_devices(2, "auto")
    with pytest.raises(PipelineError, match=r"runtime\.processes is 2, GPUs are 0.*set runtime\.device: auto"):
        require_devices(2, "cuda")


@pytest.mark.parametrize(("said", "shown"), [("4", ""), ("5", "error: torn -> mend it\n"), (None, "error: torn -> mend it\n")])
def test_what_the_first_process_has_said_is_not_said_again(
    said: str | None, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second process fails first, and the first is stopped for it, having printed the same line already, or not."""
    log = tmp_path / "run" / "attempt" / "1" / "stderr.log"
    log.parent.mkdir(parents=True)
    log.write_text("a warning\nerror: torn -> mend it\n")
    if said is not None:
        (tmp_path / "said").write_text(said)
    failures: Any = {1: SimpleNamespace(exitcode=4, timestamp=0)}
    assert _report(failures, tmp_path) == 4
    assert capsys.readouterr().err == shown
