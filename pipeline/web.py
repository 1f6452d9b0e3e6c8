"""Talk about pictures in a browser: `python -m pipeline.web`. The page is `pipeline.chat.web`."""

import typer

from pipeline.chat.web import serve

if __name__ == "__main__":
    typer.run(serve)
