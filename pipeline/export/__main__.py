"""`python -m pipeline.export MODEL OUT`: a trained model as a Transformers LLaVA folder, or with --gguf for llama.cpp.

`python -m pipeline.export import EXPORT FOLDER` is the way back, to train on or to chat with.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import ARTEFACT, PipelineError, enter_project, exit_on_error, run_command
from pipeline.export.marker import check_target


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def export(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model, such as models/sft.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; an earlier export there is replaced.")],
    gguf: Annotated[bool, typer.Option(help="GGUF files for llama.cpp instead of a Transformers folder.")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Number format of the weights.")] = Dtype.float32,
    rows: Annotated[int, typer.Option(min=1, max=64, help="Held-out rows to prove the export on.")] = 8,
    push_to_hub: Annotated[str | None, typer.Option(help="Upload to this repository, OWNER/NAME, when it is proven.")] = None,
) -> None:
    """A trained model as a folder that other software reads, proven on held-out rows before it is called done."""
    exit_on_error(
        lambda: _export(
            *enter_project(reads=[model], writes=[out]), gguf=gguf, dtype=dtype.value, rows=rows, repository=push_to_hub
        )
    )


def restore(
    folder: Annotated[Path, typer.Argument(help="A folder that `python -m pipeline.export MODEL OUT` has written.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, in this pipeline's own layout.")],
    encoder: Annotated[Path | None, typer.Option(help="Write the vision encoder too, to this folder, and use that one.")] = None,
) -> None:
    """An export back into this pipeline's own layout: to train on, or for `pipeline.chat --model`."""
    exit_on_error(lambda: _restore(folder, out, encoder))


def _export(folder: Path, out: Path, *, gguf: bool, dtype: str, rows: int, repository: str | None) -> None:
    check_target(out)
    if not (folder / "glance.json").is_file():
        raise PipelineError("no trained model here", where=str(folder), remedy="dvc repro, or name its folder", code=ARTEFACT)
    from pipeline.core import quiet_libraries
    from pipeline.export.publish import check_repository, export_model, upload

    quiet_libraries()
    if repository is not None:
        check_repository(repository)
    print(export_model(folder, out, gguf=gguf, dtype=dtype, rows=rows), flush=True)
    if repository is not None:
        print(upload(out, repository), flush=True)


def _restore(folder: Path, out: Path, encoder: Path | None) -> None:
    from pipeline.core import quiet_libraries
    from pipeline.export.restore import restore_model

    quiet_libraries()
    print(restore_model(folder, out, encoder=encoder), flush=True)


def main() -> None:
    """The command line: `import` goes the other way."""
    if sys.argv[1:2] == ["import"]:
        del sys.argv[1]
        typer.run(restore)
    else:
        typer.run(export)


if __name__ == "__main__":
    run_command(main)
