"""What a queued experiment would not see: it runs on a copy that holds what git or DVC tracks, and nothing else."""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project


def check_tracking(project: Project) -> Iterator[Finding]:
    """A note for each input that neither git nor DVC tracks, with the commands that change it."""
    if not Path(".git").exists() or not Path(".dvc").is_dir():
        return
    named = {path for path in _inputs(project) if path.exists() and not path.is_absolute()}
    untracked = [path for path in named if not _of_dvc(path, project.made) and not _of_git(path)]
    for path in sorted(untracked):
        if named.intersection(path.parents):  # goes with the folder that it lies in
            continue
        name = shlex.quote(str(path))
        untrack = f"git rm -rq --cached {name} && " if _git("ls-files", "--", str(path)) else ""  # DVC takes nothing that git has
        remedy = f"{untrack}dvc add {name} && git commit -m {shlex.quote(f'Track {path}')}"
        what = "is tracked by neither git nor DVC, so `dvc exp run --queue` and `--temp` would run without it"
        yield Finding(what, str(path), remedy, note=True)


def _inputs(project: Project) -> set[Path]:
    params, data = project.params, project.params.data
    named = [*(member.model for member in params.vision.members), params.llm.model, params.sft.start]
    named += [name for part in (data.pretrain, data.sft, data.heldout) for name in (part.records, part.images)]
    return {Path(name) for name in named}


def _of_dvc(path: Path, made: set[Path]) -> bool:
    above = [path, *path.parents]
    return any(folder in made or Path(f"{folder}.dvc").is_file() for folder in above if folder != Path())


def _of_git(path: Path) -> bool:
    """Whether git has it whole: something of it is tracked, and nothing in it is not."""
    return bool(_git("ls-files", "--", str(path))) and not _git("ls-files", "--others", "--", str(path))


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
