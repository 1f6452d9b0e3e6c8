"""Every command in the pages' code blocks is one that its program takes: names, options and arguments, nothing run."""

import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from dvc.cli.parser import get_main_parser
from test_docs import PAGES, ROOT

from pipeline.glance import COMMANDS, IMPORTS

BLOCK = re.compile(r"^ *```(?:|sh|bash|console)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
MODULES = ("pipeline.", "stages.", "benchmarks.", "pytest ")
PROGRAMS = ("glance ", "dvc ", "make ", *(f"python -m {name}" for name in MODULES))
SETTING = re.compile(r"^(?:[A-Z_]+=\S+ )+")  # of the environment, for one command


def commands() -> Iterator[tuple[str, list[str]]]:
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in map(str.strip, block.splitlines()):
                command = SETTING.sub("", line)
                if command.startswith(PROGRAMS):
                    yield from _parts(f"{page.relative_to(ROOT)}: ", command)


def _parts(where: str, line: str) -> Iterator[tuple[str, list[str]]]:
    """A line's commands: comments, what follows a pipe or `>` and line-end remarks are no part of them."""
    words, own = shlex.split(line, comments=True), list[str]()
    for word in [*words, ";"]:
        if word in (";", "&&", "|", ">", "->"):
            if own and f"{' '.join(own)} ".startswith(PROGRAMS):
                yield where + " ".join(own), own
            own = []
        else:
            own.append(word)


pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # of runpy
FOUND = list(dict(commands()).items())


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], int]:
    """Runs a module with arguments up to where its work would begin; returns its exit code."""
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", lambda *_: None)
    monkeypatch.setattr("pipeline.core.run_command", lambda command: command())

    def run(module: str, words: list[str]) -> int:
        monkeypatch.setattr("sys.argv", [module, *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize("words", [words for _, words in FOUND], ids=[name for name, _ in FOUND])
def test_a_command_of_the_pages_is_one_that_its_program_takes(parse: Callable[[str, list[str]], int], words: list[str]) -> None:
    if words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert targets
        assert {word for word in words[1:] if "=" not in word} <= set(targets[1].split()) | {".venv/bin/.installed"}
    elif words[0] == "dvc":
        get_main_parser().parse_args(words[1:])
    elif words[0] == "glance":
        module = COMMANDS[words[1]][0]
        first, rest = [], words[2:]
        if words[1] == "import":
            module, *first = IMPORTS.get(Path(words[2]).suffix, ["pipeline.export", "import"])
        assert parse(module, [*first, *rest]) == 0
    elif words[2] == "pytest":
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests/"))
    elif words[2].startswith("stages."):
        assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
        assert set(words[3:]) <= {"--debug"}
    else:
        assert parse(words[2], words[3:]) == 0


def test_a_command_that_there_is_not_is_noticed(parse: Callable[[str, list[str]], int]) -> None:
    assert len(FOUND) > 40
    assert parse("pipeline.project.new", ["photos", "--nonsense"]) == 2
    assert parse("pipeline.features", ["nonsense"]) == 2
    assert parse("pipeline.export", ["only-one"]) == 2
    assert parse("pipeline.chat", ["a", "b", "c"]) == 2
