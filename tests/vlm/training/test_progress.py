"""The progress line: figures are made where it is printed, so that a device's memory is not asked for in every step."""

import pytest
from accelerate import Accelerator

from pipeline.vlm.training import progress
from pipeline.vlm.training.progress import Progress


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A note of each time that memory is asked for."""
    found: list[object] = []
    plain = progress.peak_memory_gb
    monkeypatch.setattr(progress, "peak_memory_gb", lambda device: found.append(device) or plain(device))
    return found


def test_figures_are_made_where_the_line_is_printed_and_after_the_last_step(
    asked: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress(50, 0, "train", Accelerator(cpu=True))
    shown._bar.mininterval = 1e9  # nothing is printed on the way
    shown._padded = shown._real = 1
    for step in range(50):
        shown.show({"loss": 1.0 - step / 50, "lr": 0.1})
        assert len(asked) == (step == 49)
    shown.close()
    assert "loss=0.0200" in capsys.readouterr().err, "the last step's"


def test_a_process_that_shows_nothing_asks_for_nothing(asked: list[object]) -> None:
    shown = Progress(3, 0, "train", Accelerator(cpu=True))
    shown._bar.disable = True
    for _ in range(3):
        shown.show({"loss": 1.0, "lr": 0.1})
    assert not asked
