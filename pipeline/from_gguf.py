"""A GGUF file as a Transformers folder: `python -m pipeline.from_gguf`. The work is `pipeline.export.from_gguf`."""

import typer

from pipeline.core import run_command
from pipeline.export.from_gguf import from_gguf

if __name__ == "__main__":
    run_command(lambda: typer.run(from_gguf))
