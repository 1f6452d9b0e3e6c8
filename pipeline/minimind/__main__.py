"""`python -m pipeline.minimind import FILE.pth OUT` and `export FOLDER FILE.pth`: weights from and to MiniMind."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import exit_on_error, run_command

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


class Dtype(StrEnum):
    """Number formats of an exported file."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="MiniMind (llm_*.pth) or MiniMind-V (sft_vlm_*.pth) weights.")],
    out: Annotated[Path, typer.Argument(help="The Transformers folder to make.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer and chat template are copied into OUT.")] = None,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint", help="With the encoder of params.yaml, make a model that chat and sft open.")
    ] = False,
    image_token: Annotated[str | None, typer.Option(help="Stands where an image goes. [MiniMind's: @ or <|image_pad|>]")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of a 2025 model. [MiniMind's: 8]")] = None,
    experts_per_token: Annotated[int | None, typer.Option(min=1, help="Of a mixture. [MiniMind's: 2 in 2025, 1 in 2026]")] = None,
    eps: Annotated[float | None, typer.Option(min=1e-12, max=1.0, help="Of its RMSNorm. [MiniMind's: 1e-5, 1e-6]")] = None,
    rope_theta: Annotated[float | None, typer.Option(min=1.0, max=1e12, help="Rotary base. [MiniMind's: 1e6]")] = None,
    positions: Annotated[int | None, typer.Option(min=1, help="Longest sequence, in tokens. [MiniMind's: 32768]")] = None,
) -> None:
    """MiniMind weights -> a folder that llm.model can name, and the projector where there is one."""

    def work() -> None:
        from pipeline.core import quiet_libraries
        from pipeline.minimind.importing import Given, import_file

        quiet_libraries()
        given = Given(heads, experts_per_token, eps, rope_theta, positions, image_token)
        print("\n".join(import_file(file, out, given=given, tokenizer=tokenizer, as_checkpoint=checkpoint)))

    exit_on_error(work)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="A trained model (models/sft) or a Transformers folder.")],
    file: Annotated[Path, typer.Argument(help="The .pth file to write.")],
    dtype: Annotated[Dtype, typer.Option(help="Number format of the file.")] = Dtype.float16,
) -> None:
    """A model of this project -> weights in MiniMind's layout."""

    def work() -> None:
        from pipeline.core import quiet_libraries
        from pipeline.minimind.exporting import export_folder

        quiet_libraries()
        print("\n".join(export_folder(folder, file, dtype=dtype.value)))

    exit_on_error(work)


if __name__ == "__main__":
    run_command(app)
