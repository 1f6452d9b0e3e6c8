"""What all stages share: one-line errors, figures on disk, no orphan, interruption; and the report made of the figures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from projects import with_path

from pipeline.core.checksums import sign
from pipeline.core.costs import keep_figures
from pipeline.core.errors import PipelineError
from pipeline.core.files import link_or_copy, main_checkout, publish, publish_folder, write_json
from pipeline.core.frame import exit_on_error
from pipeline.report import read_metrics, tables

ROOT = Path(__file__).parents[2]


def test_an_error_is_one_line_without_control_characters_or_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise PipelineError("bad \x1b[31m<BytesIO object at 0x7f00deadbeef>\nsecond line", where="f:1", remedy="mend it", code=4)

    with pytest.raises(SystemExit) as stopped:
        exit_on_error(fail)
    assert stopped.value.code == 4
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "\x1b" not in line
    assert "0x7f" not in line
    assert line.startswith("error: f:1: bad")


def stage(name: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{name}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": with_path(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like the project's root, with its data."""
    for name in ("params.yaml", "dvc.yaml", "data"):
        (tmp_path / name).symlink_to(ROOT / name) if name != "data" else (tmp_path / name).mkdir()
    for name in ("easyvqa", "models"):
        (tmp_path / "data" / name).symlink_to(ROOT / "data" / name)
    (tmp_path / ".dvc").mkdir()
    return tmp_path


def test_a_stage_whose_input_is_missing_says_which_command_makes_it(checkout: Path) -> None:
    (checkout / "data/features_meta").mkdir()
    (checkout / "data/features_meta/encoder.json").write_text('{"tokens": 64, "width": 128}')
    done = stage("pretrain", checkout)
    _, err = done.communicate(timeout=120)
    assert done.returncode == 4
    assert err.strip().startswith("error: data/tokens/pretrain.arrow:")
    assert "dvc repro tokenize" in err
    assert len(err.strip().splitlines()) == 1


def test_ctrl_c_ends_a_stage_with_one_line_and_no_output(checkout: Path) -> None:
    running = stage("extract", checkout)
    assert running.stdout is not None
    assert "5,000 to encode" in running.stdout.readline()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert err.splitlines()[-1] == "interrupted: run the same command to go on"
    assert "Traceback" not in err
    assert not (checkout / "data/features").exists()
    assert list((checkout / ".dvc/features").rglob("*.tmp")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="PDEATHSIG is Linux's")
def test_a_stage_ends_when_dvc_is_killed(checkout: Path) -> None:
    """A parent killed with -9 must not leave a writer behind."""
    code = "import subprocess,sys; p=subprocess.Popen([sys.executable,'-m','stages.tokenize']); print(p.pid,flush=True); p.wait()"
    (checkout / "data/features_meta").mkdir()
    (checkout / "data/features_meta/encoder.json").write_text('{"tokens": 64, "width": 128}')
    np.save(checkout / "data/features_meta/images.npy", np.empty((0, 32), np.uint8))
    sign(checkout / "data/features_meta")
    environment = {**os.environ, "PYTHONPATH": with_path(ROOT), "DVC_ROOT": str(checkout)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(4)  # past the imports
    parent.kill()
    parent.wait()
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the stage outlived its parent")


def test_a_file_or_folder_that_fails_midway_leaves_the_old_one(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})

    def write_half() -> None:
        with publish(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    with publish_folder(tmp_path / "folder") as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(RuntimeError), publish_folder(tmp_path / "folder") as temporary:
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.json", "checksums.json", "folder", "one"]


def test_not_a_number_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_links_share_bytes_with_the_store(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").stat().st_ino == (tmp_path / "b").stat().st_ino


def test_a_temporary_workspace_finds_the_checkout_it_belongs_to(tmp_path: Path) -> None:
    workspace = tmp_path / "main/.dvc/tmp/exps/standalone/tmpabc"
    workspace.mkdir(parents=True)
    assert main_checkout(workspace) == tmp_path / "main"
    assert main_checkout(tmp_path / "main") == tmp_path / "main"


def test_the_report_shows_the_figures_and_names_a_stage_without_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = {"accuracy": 0.5, "accuracy_blind": 0.25, "loss": 1.0, "questions": 8, "seconds": 71.0}
    shared = {"seconds": 1.0, "peak_memory_gb": 1.0}
    figures = {"extract": {"images": 3, "cache_mb": 1.5, **shared}, "tokenize": shared, "pretrain": training, "sft": training}
    monkeypatch.chdir(tmp_path)
    for name, content in figures.items():
        keep_figures(tmp_path / f"{name}.json", content)
    assert "seconds" not in json.loads((tmp_path / "sft.json").read_text()), "the same result is the same file"
    from io import StringIO

    from rich.console import Console

    out = StringIO()
    for table in tables(read_metrics(tmp_path)):
        Console(file=out, width=100).print(table)
    for part in ("50.00%", "25.00%", "1.5 MB", "8 held-out questions", "71.0"):
        assert part in out.getvalue()
    (tmp_path / "sft.json").unlink()
    with pytest.raises(PipelineError, match=r"sft\.json: no figures yet"):
        read_metrics(tmp_path)
