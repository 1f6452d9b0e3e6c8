"""A project to check, and what is said of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from conftest import ROWS
from ruamel.yaml import YAML
from typer.testing import CliRunner

from pipeline.check.command import app

ROOT = Path(__file__).parents[2]
Png = Callable[[int], bytes]


@dataclass
class Project:
    """A folder with a params.yaml of tiny models and three data sets of the same rows over other pictures."""

    folder: Path

    def set(self, **changes: Any) -> None:
        path = self.folder / "params.yaml"
        content = YAML(typ="safe").load(path)
        for key, value in changes.items():
            section, _, name = key.partition("__")
            content[section][name] = value
        YAML().dump(content, path)

    def write(self, name: str, *rows: Any) -> Path:
        path = self.folder / f"{name}.jsonl"
        path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in rows))
        return path

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture
def project(
    tmp_path: Path, llm_folder: Path, vision_folders: dict[str, Path], png: Png, monkeypatch: pytest.MonkeyPatch
) -> Project:
    (tmp_path / "images").mkdir()
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    content = YAML(typ="safe").load(ROOT / "params.yaml")
    content["vision"]["model"], content["llm"]["model"] = str(vision_folders["clip"]), str(llm_folder)
    for name in ("pretrain", "sft", "heldout"):
        content["data"][name] |= {"records": str(tmp_path / f"{name}.jsonl"), "images": str(tmp_path / "images")}
    YAML().dump(content, tmp_path / "params.yaml")
    made = Project(tmp_path)
    made.write("rows", *ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.check.costs.ENOUGH", 0.0)  # how long a rate is measured matters to people
    monkeypatch.setattr("pipeline.check.training.CHEAP", 0)  # training is timed where a test asks for it
    return made


def flat(text: str) -> str:
    """Output as one line of single spaces: where a line of a table is broken does not matter."""
    return " ".join(text.split())


def require_one_line(run: Result, code: int) -> str:
    assert run.exit_code == code, run.output
    assert "Traceback" not in run.output
    (line,) = [line for line in run.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line
