"""Talk about pictures in a browser: `python -m pipeline.web`. The page is `pipeline.chat.web`."""

import typer

from pipeline.chat.web import serve
from pipeline.core import run_command

if __name__ == "__main__":
    run_command(lambda: typer.run(serve))
