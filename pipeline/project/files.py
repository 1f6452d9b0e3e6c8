"""params.yaml and dvc.yaml changed in place: comments, order and layout stay, and every change is shown before it is written."""

import difflib
import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from ruamel.yaml import YAML

from pipeline.check import Project, check_tracking
from pipeline.core import PipelineError, publish
from pipeline.params import Dataset, check, load, read_yaml

OPTIONAL = set(Dataset.model_fields) - {"records", "images"}
STYLES = {"+": "green", "-": "red", "@": "cyan"}


class Files:
    """The two files of a project; changes are collected, shown as one diff and written together.

    Raises `PipelineError` where one of them is not there or is no YAML.
    """

    def __init__(self, root: Path = Path()) -> None:
        self._paths = {name: root / name for name in ("params.yaml", "dvc.yaml")}
        for path in self._paths.values():
            read_yaml(path)  # bounded, and its faults in one line
        self._before = {name: path.read_text(encoding="utf-8") for name, path in self._paths.items()}
        self.params: Any = _yaml().load(self._before["params.yaml"])
        self.dvc: Any = _yaml().load(self._before["dvc.yaml"])

    def change(self, section: str, values: Mapping[str, Any]) -> None:
        """Change keys of a section of params.yaml, `data.pretrain` for example; others keep their values."""
        target = self.params
        for part in section.split("."):
            target = target[part]
        for key, value in values.items():
            target[key] = value

    def forget(self, section: str, kept: set[str]) -> None:
        """Take optional keys of a data set (`mix`, `columns` ...) out that are not in `kept`."""
        target = self.params
        for part in section.split("."):
            target = target[part]
        for key in set(target) & OPTIONAL - kept:
            del target[key]

    def plain_params(self) -> dict[str, Any]:
        """params.yaml with the changes, as plain values."""
        content: dict[str, Any] = YAML(typ="safe", pure=True).load(self.texts()["params.yaml"])
        return content

    @staticmethod
    def load(path: Path) -> Any:
        """Another YAML file, with the spelling of its numbers."""
        read_yaml(path)
        return _yaml().load(path.read_text(encoding="utf-8"))

    def texts(self) -> dict[str, str]:
        """What each file would hold."""
        found = {}
        for name, content in (("params.yaml", self.params), ("dvc.yaml", self.dvc)):
            text = io.StringIO()
            _yaml().dump(content, text)
            found[name] = text.getvalue()
        return found

    def diff(self) -> str:
        """The changes of both files, as `diff -u` would show them."""
        lines: list[str] = []
        for name, text in self.texts().items():
            before = self._before[name].splitlines()
            lines += difflib.unified_diff(before, text.splitlines(), name, name, n=0, lineterm="")
        return "\n".join(lines)

    def write(self) -> None:
        """Both files, each whole or not at all; raises `PipelineError` for params that no stage would take."""
        texts = self.texts()
        check(self.plain_params(), where="params.yaml")
        for name, text in texts.items():
            if text != self._before[name]:
                with publish(self._paths[name]) as temporary:
                    temporary.write_text(text, encoding="utf-8")


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 4096
    return yaml


def in_params(path: Path) -> str:
    """A path within the project as it is from there, another one absolute: a queued experiment runs in another folder."""
    real, root = os.path.abspath(path), os.getcwd()
    return os.path.relpath(real, root) if os.path.commonpath([real, root]) == root else real


def propose(files: Files, console: Console, *, yes: bool, dry_run: bool) -> bool:
    """Show the changes and write them, after asking where a person can answer; returns whether they stand in the files."""
    changes = files.diff()
    if not changes:
        console.print("params.yaml and dvc.yaml stay as they are.")
        return True
    for line in changes.splitlines():
        console.print(Text(line, style=STYLES.get(line[:1], "")), soft_wrap=True)
    if dry_run:
        console.print("nothing is written: --dry-run")
        return False
    if not yes:
        if not sys.stdin.isatty():
            raise PipelineError("nobody is here to say yes", where="standard input", remedy="add --yes, or --dry-run to look only")
        if not _agreed():
            console.print("nothing is written")
            return False
    files.write()
    return True


def _agreed() -> bool:
    """Whether the person says yes; Ctrl-D says no."""
    try:
        return typer.confirm("Write this?", default=True)
    except typer.Abort:
        print()
        return False


def tell_untracked(console: Console) -> None:
    """What a queued experiment would go without, with the command that changes it."""
    found = list(check_tracking(Project(load(Path("params.yaml")))))
    if found:
        console.print("\nbefore a sweep, because an experiment sees what git or DVC tracks:")
    for finding in found:
        console.print(f"  {finding.remedy}", highlight=False, soft_wrap=True)
