"""Options of every way to talk to a model, in a terminal or in a browser."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import ARTEFACT, PipelineError

# Options of every way to talk to a model (see also pipeline.chat.web)
Model = Annotated[Path, typer.Option(help="Folder of a trained model.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=10.0, help="0 is greedy: the likeliest words.")]
TopP = Annotated[float, typer.Option(min=0.001, max=1.0, help="Draw from the likeliest words up to this share.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same answers.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]


@dataclass(frozen=True, slots=True)
class Settings:
    """What a person asked for on the command line; `drawn` are max_tokens, temperature, top_p and seed."""

    model: Path
    drawn: tuple[int, float, float, int]
    device: str
    save: Path | None = None
    stats: bool = False
    thumbnails: bool = True


def require_model(folder: Path) -> None:
    """Raises `PipelineError` saying what makes a model, where `folder` holds none; before anything heavy is imported."""
    if not (folder / "glance.json").is_file():
        remedy = "dvc repro" if folder == Path("models/sft") else "dvc repro, or --model models/sft"
        raise PipelineError("no trained model here", where=str(folder), remedy=remedy, code=ARTEFACT)
