"""The command `python -m pipeline.report`."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import PipelineError, enter_project, exit_on_error, make_folder, quiet_libraries
from pipeline.report.table import show_table

app = typer.Typer(add_completion=False)


@app.command()
def report(
    experiments: Annotated[
        list[str] | None, typer.Argument(help="Experiments or commits to set side by side, as `dvc exp show` names them.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the whole report here, one file that needs nothing else.")] = None,
    look: Annotated[
        bool, typer.Option("--look", help="With --html: which parts of the gallery's pictures each word looked at.")
    ] = False,
) -> None:
    """What did the last run give? A table, or with --html a page of curves, answers and pictures."""
    exit_on_error(lambda: _report(experiments or [], html, look=look))


def _report(names: list[str], html: Path | None, *, look: bool) -> None:
    if look and (html is None or names):
        remedy = "dvc exp apply NAME, then glance report --html report.html --look" if names else "add --html report.html"
        raise PipelineError("shows the work tree's model, on the page", where="--look", remedy=remedy)
    if html is None:
        if names:
            raise PipelineError("experiments are told by the page", where="command line", remedy="add --html report.html")
        enter_project()
        show_table()
        return
    if html.suffix.lower() not in (".html", ".htm"):
        raise PipelineError("expected a name that ends in .html", where=str(html), remedy="set --html")
    [html] = enter_project(writes=[html])
    make_folder(html.parent)
    quiet_libraries()
    from pipeline.report.page import write_report  # what it imports takes a second, which the table need not wait for

    size = write_report(html, names, look=look)
    print(f"{html}: {size / 1e6:.1f} MB, opens in any browser, also from a mail")
