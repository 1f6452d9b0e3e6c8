"""The command: every check in turn, what it finds, and what was mended."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from pipeline.core import ARTEFACT, PipelineError, exit_on_error, main_checkout
from pipeline.doctor import dvc, git, leftovers, machine
from pipeline.doctor.finding import Check, Finding

CHECKS: tuple[Check, ...] = (
    git.detached_head, git.experiment_refs, git.changed_params,
    dvc.temporary_workspaces, dvc.stale_locks, dvc.changed_cache,
    leftovers.temporary_files, leftovers.unfinished_runs, leftovers.unused_stores, leftovers.missing_models, leftovers.pointers,
    machine.orphans, machine.shared_memory,
)  # fmt: skip


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="Do what loses no work: remove what killed runs left.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read DVC's cache, which takes minutes where it is large.")] = False,
) -> None:
    """What have crashes and careless hands left behind here, and what mends it? Exit code 0: nothing; 4: something is left."""
    exit_on_error(lambda: _doctor(fix=fix, quick=quick))


def examine(root: Path, *, quick: bool = False) -> Iterator[Finding]:
    """Every finding of every check, `quick` without those that read all data."""
    for check in CHECKS:
        if not (quick and check is dvc.changed_cache):
            yield from check(root)


def _doctor(*, fix: bool, quick: bool) -> None:
    root, left = main_checkout(), 0
    if not (root / "dvc.yaml").is_file():
        raise PipelineError("no dvc.yaml here", where=str(root), remedy="run it in the project's folder")
    for finding in examine(root, quick=quick):
        if fix and finding.mend is not None:
            finding.mend()
            print(f"{finding.what} -> done: {finding.remedy}")
        else:
            left += 1
            print(f"{finding.what} -> {finding.remedy}{' (--fix does it)' if finding.mend else ''}")
    if left:
        raise PipelineError(f"{left} things to look at", remedy="see above", code=ARTEFACT)
    print("nothing is left behind" if not quick else "nothing is left behind; DVC's cache was not read")
