"""Figures of a stage behind one that has run alone go with the checkpoint that they started from."""

import json
from pathlib import Path

import pytest

from stages.stale import drop_stale_figures


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, and figures of a stage that started from it: the hash is DVC 3.67's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/pretrain/deep").mkdir(parents=True)
    (tmp_path / "metrics").mkdir()
    (tmp_path / "models/pretrain/a.txt").write_text("one")
    (tmp_path / "models/pretrain/deep/b.txt").write_text("two")
    (tmp_path / "metrics/sft.json").write_text("{}")
    deps = [{"path": "data/tokens", "md5": "x"}, {"path": "models/pretrain", "md5": "ffc97ce992630d5cb35e27cd8478bfc2.dir"}]
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": {"extract": {"cmd": "x"}, "sft": {"deps": deps}}}))
    return tmp_path


def test_figures_of_the_same_checkpoint_stay(project: Path) -> None:
    drop_stale_figures("pretrain")
    assert (project / "metrics/sft.json").exists()


@pytest.mark.parametrize("model", ["another", "none"])
def test_figures_of_another_checkpoint_are_removed_with_a_line(
    model: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = project / "models/pretrain/a.txt"
    path.write_text("other") if model == "another" else path.unlink()
    drop_stale_figures("pretrain")
    assert not (project / "metrics/sft.json").exists()
    assert capsys.readouterr().out.startswith("pretrain: metrics/sft.json was of another models/pretrain and is removed")


@pytest.mark.parametrize("lock", ["", "{", "[1]", '{"stages": 3}', '{"stages": {"sft": {"deps": [1]}}}', None])
def test_a_lock_that_tells_nothing_removes_nothing(lock: str | None, project: Path) -> None:
    (project / "dvc.lock").unlink() if lock is None else (project / "dvc.lock").write_text(lock)
    (project / "models/pretrain/a.txt").write_text("other")
    drop_stale_figures("pretrain")
    assert (project / "metrics/sft.json").exists()
