"""`glance COMMAND`: every command of the project under one name; `python -m pipeline.COMMAND` is the same."""

import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import PipelineError, run_command

# name -> module that runs it, panel of the help, what it does
COMMANDS: dict[str, tuple[str, str, str]] = {
    "new": ("pipeline.project.new", "Set up", "Your own pictures: finds what they are and writes params.yaml."),
    "use": ("pipeline.project.use", "Set up", "Other models: a ready pair, a hub id or a folder."),
    "check": ("pipeline.check", "Set up", "Every row and picture before any GPU second, and what stands in the way of a run."),
    "advise": ("pipeline.advise", "Set up", "Does caching features pay? Timed here on your data, encoder and language model."),
    "params": ("pipeline.params", "Set up", "Is params.yaml right, also with some keys changed?"),
    "report": (
        "pipeline.report",
        "Look",
        "What the last run gave; --html: one page of curves, answers and pictures, also of several experiments.",
    ),
    "score": ("pipeline.score", "Look", "A model on public benchmarks (POPE, GQA, MMBench and others), blind beside every score."),
    "doctor": ("pipeline.doctor", "Look", "What killed runs and careless hands have left behind, and what mends it."),
    "features": ("pipeline.features", "Look", "The feature store: verify, info, show."),
    "chat": ("pipeline.chat", "Use a model", "Talk about a picture in the terminal."),
    "look": ("pipeline.look", "Use a model", "Which parts of a picture each word of an answer looked at, as a PNG."),
    "web": ("pipeline.web", "Use a model", "Talk about pictures in a browser, on this machine only."),
    "export": ("pipeline.export", "Use a model", "A standard Transformers folder, or GGUF for llama.cpp, proved equal."),
    "import": ("", "Use a model", "An export, MiniMind's .pth or a GGUF file back into this project."),
}
IMPORTS = {".pth": ["pipeline.minimind", "import"], ".gguf": ["pipeline.from_gguf"]}

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="A vision-language model of any frozen CLIP and any small language model; every picture is encoded once.",
    epilog="Stages run with `dvc repro` and `dvc exp run -S pretrain.lr=2e-3`. Each command has its own --help.",
)


@app.callback()
def _top(
    show_version: Annotated[bool, typer.Option("--version", help="Show the version and end.", is_eager=True)] = False,
) -> None:
    if show_version:
        print(f"glance {version('glance-vlm')}")
        raise typer.Exit


def _run(module: str, arguments: list[str]) -> None:
    """As `python -m MODULE ARGUMENTS` would."""
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _import(arguments: list[str]) -> None:
    """By what is imported: a .pth file of MiniMind, a GGUF file, else a folder that `glance export` wrote."""
    sources = [argument for argument in arguments if not argument.startswith("-")]
    if not sources:
        raise PipelineError("nothing to import", remedy="glance import FILE_OR_FOLDER OUT", where="glance import")
    module, *first = IMPORTS.get(Path(sources[0]).suffix.lower(), ["pipeline.export", "import"])
    _run(module, [*first, *arguments])


def _add(name: str, module: str, panel: str, text: str) -> None:
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

    @app.command(name, help=text, rich_help_panel=panel, context_settings=settings, add_help_option=False)
    def _command(context: typer.Context) -> None:
        if name == "import":
            _import(context.args)
        else:
            _run(module, context.args)


for _name, (_module, _panel, _text) in COMMANDS.items():
    _add(_name, _module, _panel, _text)


def main() -> None:
    """The console script."""
    run_command(app)


if __name__ == "__main__":
    main()
