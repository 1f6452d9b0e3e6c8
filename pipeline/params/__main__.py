"""`python -m pipeline.params [key=value ...]`: is params.yaml right, also with some keys changed?"""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import enter_project, exit_on_error, run_command
from pipeline.params.reading import check, override, read_yaml
from pipeline.params.schema import keys_of

app = typer.Typer(add_completion=False)


@app.command()
def params(
    changes: Annotated[list[str] | None, typer.Argument(help="Keys to try with other values: pretrain.lr=2e-3.")] = None,
) -> None:
    """Is params.yaml right, also with some keys changed? Nothing is written; a wrong key or value is one line that names it."""
    exit_on_error(lambda: _check(changes or []))


def _check(changes: list[str]) -> None:
    enter_project()
    content = read_yaml(Path("params.yaml"))
    override(content, changes)
    check(content, where="params.yaml")
    print(f"params.yaml: {sum(1 for _ in keys_of())} keys, all valid")


if __name__ == "__main__":
    run_command(app)
