"""`python -m pipeline.look`: see `pipeline.chat.look`."""

import typer

from pipeline.chat.look import look
from pipeline.core import run_command

if __name__ == "__main__":
    run_command(lambda: typer.run(look))
