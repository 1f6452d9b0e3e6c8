"""`dvc exp run -S` rewrites params.yaml: the layout that stands there is one that comes back as it was."""

import shutil
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from projects import ROOT

FILES = [ROOT / "params.yaml", *sorted((ROOT / "docs/params").glob("*.yaml"))]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_a_changed_key_changes_its_line_and_no_other(tmp_path: Path, file: Path) -> None:
    changed = tmp_path / "params.yaml"
    shutil.copy(file, changed)
    apply_overrides(changed, ["evaluate.limit=12345"])
    before, after = file.read_text(encoding="utf-8").splitlines(), changed.read_text(encoding="utf-8").splitlines()
    different = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [new.split("#")[0].strip() for _, new in different] == ["limit: 12345"]
