"""Talk about pictures with a trained model: `python -m pipeline.chat [PICTURE] [QUESTION]`.

Reads models/sft (or --model). With a picture and a question it answers once and ends; with a folder or a .jsonl of questions it
answers for each; otherwise it is a talk. Greedy and seeded unless told otherwise. Ends with 0; with 130 after Ctrl-C while it
loads or has nobody to ask, 141 when whoever reads its output goes; else with one line that says why.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipeline.chat.interrupts import Interrupts, leaving_at_once
from pipeline.chat.options import Device, MaxTokens, Model, Seed, Settings, Temperature, TopP, require_model
from pipeline.chat.paths import find_pictures, read_picture, require_text
from pipeline.core import exit_on_error, in_project, run_command


def chat(
    picture: Annotated[str | None, typer.Argument(help="A picture to talk about, a folder of pictures, or a .jsonl.")] = None,
    question: Annotated[str | None, typer.Argument(help="Ask this, print the answer and end.")] = None,
    model: Model = Path("models/sft"),
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
    stats: Annotated[bool, typer.Option("--stats", help="Tokens a second, and how long the first one took.")] = False,
    save: Annotated[Path | None, typer.Option(help="Add what is said to this .md or .jsonl.")] = None,
    thumbnails: Annotated[bool, typer.Option(help="Small pictures in a terminal that shows colours.")] = True,
) -> None:
    """Talk about pictures with a trained model, or ask a question of a folder of them."""
    settings = Settings(in_project(model), (max_tokens, temperature, top_p, seed), device, save, stats, thumbnails)
    exit_on_error(lambda: _chat(picture or "", question or "", settings))


def _chat(picture: str, question: str, settings: Settings) -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # bytes that are no text must not end a talk
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    require_model(settings.model)
    require_text(question, "the question")
    with leaving_at_once():
        _answer(picture, question, settings)


def _answer(picture: str, question: str, settings: Settings) -> None:
    for path in find_pictures(picture):
        if path.is_dir() or path.suffix.lower() == ".jsonl":
            from pipeline.chat.many import ask_all

            ask_all(path, question, settings)
            return
        read_picture(path)  # what is wrong with it is known before anything is loaded
    from pipeline.chat.terminal import converse, open_talk

    talk = open_talk(settings)
    if picture:
        talk.show(picture, quiet=bool(question))
    if question:
        talk.say(question)
    elif sys.stdin.isatty():
        with Interrupts() as interrupts:
            converse(talk, interrupts)
    else:
        converse(talk, None)


if __name__ == "__main__":
    run_command(lambda: typer.run(chat))
