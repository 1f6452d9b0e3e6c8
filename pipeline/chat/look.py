"""Where did an answer come from? `python -m pipeline.look PICTURE... QUESTION [--out look.png]`.

Answers as `pipeline.chat` does, greedily, and draws for each word of the answer which patches of the pictures it looked at.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.chat.options import Device, MaxTokens, Model, require_model
from pipeline.chat.paths import find_pictures, read_picture, require_text, show
from pipeline.core import PipelineError, exit_on_error, in_project, make_folder, publish, quiet_libraries, writing

if TYPE_CHECKING:
    from PIL import Image

    from pipeline.chat.assistant import Assistant, Conversation
    from pipeline.records import Turn
    from pipeline.saliency import Seen

DRAWN = 30  # words of an answer on a sheet
USAGE = 'glance look photo.jpg "what is it?"'


def look(
    asked: Annotated[list[str], typer.Argument(metavar="PICTURE... QUESTION", help="One picture or several, and a question.")],
    out: Annotated[Path, typer.Option(help="The .png to write.")] = Path("look.png"),
    by: Annotated[list[str] | None, typer.Option(help="rollout, gradient or tokens; may be given several times.")] = None,
    model: Model = Path("models/sft"),
    max_tokens: MaxTokens = 32,
    device: Device = "auto",
) -> None:
    """Where an answer came from: which parts of the picture each of its words looked at, as a PNG."""
    exit_on_error(lambda: _look(asked, out, by or ["rollout", "gradient"], in_project(model), max_tokens, device))


def _look(asked: list[str], out: Path, by: list[str], model: Path, max_tokens: int, device: str) -> None:
    *named, question = asked
    if out.suffix.lower() != ".png":
        raise PipelineError("expected a name that ends in .png", where=show(out), remedy="set --out")
    if wrong := [method for method in by if method not in ("rollout", "gradient", "tokens")]:
        raise PipelineError("no such way of looking", where=f"--by {wrong[0]}", remedy="take rollout, gradient or tokens")
    paths = [path for text in named for path in find_pictures(text)]
    if not paths or not question.strip():
        raise PipelineError("expected a picture and a question", where="command line", remedy=USAGE)
    require_model(model)
    files = [read_picture(path) for path in paths]
    require_text(question, "the question")
    if out.is_dir():
        raise PipelineError("is a folder", where=show(out), remedy="set --out to the name of a file")
    make_folder(out.parent)
    quiet_libraries()
    with publish(out) as temporary:  # a place that takes no file is told before a model is loaded
        assistant, talk = _answer(paths, files, question, model=model, most=max_tokens, device=device)
        seen = look_back(assistant, talk.turns, files, list(dict.fromkeys(by)))
        sheet = sheet_of(assistant, files, seen)
        with writing(out):
            sheet.save(temporary, "PNG", optimize=True)
    from pipeline.saliency import METHODS

    left_out = f", the first {DRAWN} of {len(seen.words)}" if len(seen.words) > DRAWN else ""
    print(f"{show(out)}: {' '.join(seen.words[:DRAWN])}{left_out}")
    for maps in seen.maps:
        print(f"  {maps.method}: {METHODS[maps.method]}")


def _answer(
    paths: Sequence[Path], files: Sequence[bytes], question: str, *, model: Path, most: int, device: str
) -> "tuple[Assistant, Conversation]":
    """A talk of one question about all pictures, answered; the answer is printed."""
    from pipeline.chat.assistant import Assistant, Conversation, Sampling

    assistant, talk = Assistant(model, device=device), Conversation()
    assistant.ask(talk, question, [assistant.look_at(data, show(path)) for path, data in zip(paths, files, strict=True)])
    for _ in assistant.answer(talk, Sampling(most)):
        pass
    print("".join(map(str, talk.turns[-1].parts)), flush=True)
    return assistant, talk


def look_back(assistant: "Assistant", turns: Sequence["Turn"], files: Sequence[bytes], methods: Sequence[str]) -> "Seen":
    """Maps of the last turn of an answered talk; `files` are all the pictures that it shows. Waits for its turn at the model."""
    import numpy as np
    import torch

    from pipeline import saliency

    encoder, *others = assistant.encoder.members
    if others:
        what = f"a model that joins {1 + len(others)} encoders is not looked back through"
        raise PipelineError(what, where="vision.model", remedy="train with one encoder")
    pixels = [encoder.preprocess(data, where=f"picture {number}") for number, data in enumerate(files, 1)]
    shown = torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0, 3, encoder.side, encoder.side)
    with assistant.one_at_a_time:
        tower = assistant.exact_tower
        return saliency.look_back(assistant.model, encoder, assistant.builder, turns, shown, methods, tower=tower)


def sheet_of(assistant: "Assistant", files: Sequence[bytes], seen: "Seen", *, across: int = 6) -> "Image.Image":
    """All maps drawn over the pictures, so many cells side by side."""
    from pipeline.records import decode
    from pipeline.saliency import METHODS, draw_sheet, find_box

    pictures = [decode(data, where=f"picture {number}") for number, data in enumerate(files, 1)]
    boxes = [find_box(assistant.encoder.members[0].preprocess, picture.size) for picture in pictures]
    lines = [(f"{maps.method}: {METHODS[maps.method]}", maps.heat[:DRAWN]) for maps in seen.maps]
    return draw_sheet(pictures, boxes, seen.words[:DRAWN], lines, across=across)
