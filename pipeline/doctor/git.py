"""What a killed `dvc exp run` does to the repository: HEAD on no branch, its own references, changed parameters."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.core import PipelineError
from pipeline.doctor.finding import Finding, git
from pipeline.params import read_yaml

EXEC = "refs/exps/exec"


def detached_head(root: Path) -> Iterator[Finding]:
    """HEAD stays on the commit of an experiment that was killed, where the next commit would be on no branch."""
    if git(root, "rev-parse", "HEAD") is None or git(root, "symbolic-ref", "-q", "HEAD") is not None:
        return
    branch = git(root, "rev-parse", "--abbrev-ref", "@{-1}") or "main"
    why = "a killed `dvc exp run` left HEAD on no branch" if _exec_refs(root) else "HEAD is on no branch"
    yield Finding(why, f"git checkout -f {branch} && dvc checkout (uncommitted changes of tracked files are lost)")


def experiment_refs(root: Path) -> Iterator[Finding]:
    """References that DVC keeps while an experiment runs in the workspace, with no such experiment."""
    refs = _exec_refs(root)
    if refs and git(root, "symbolic-ref", "-q", "HEAD") is not None:

        def mend() -> None:
            for ref in refs:
                git(root, "update-ref", "-d", ref)

        yield Finding(f"{len(refs)} references of a killed `dvc exp run` ({refs[0]})", f"git update-ref -d {' '.join(refs)}", mend)


def _exec_refs(root: Path) -> list[str]:
    found = (git(root, "for-each-ref", "--format=%(refname)", EXEC) or "").split()
    return [ref for ref in found if ref != f"{EXEC}/EXEC_APPLY"]  # that one says which experiment stands in the workspace


def changed_params(root: Path) -> Iterator[Finding]:
    """Parameters that differ from the commit: a killed or failed experiment leaves its own, and the next run inherits them."""
    committed = git(root, "show", "HEAD:params.yaml")
    if committed is None or git(root, "status", "--porcelain", "params.yaml") in (None, ""):
        return
    before, now = root / ".git" / "params-of-head.yaml", root / "params.yaml"
    before.write_text(committed, encoding="utf-8")
    try:
        old, new = dict(_flat(read_yaml(before))), dict(_flat(read_yaml(now)))
    except PipelineError as error:
        yield Finding(f"params.yaml cannot be read: {error.what}", "git checkout params.yaml")
        return
    finally:
        before.unlink()
    differ = [f"{key} {old.get(key, '-')} -> {new.get(key, '-')}" for key in {**old, **new} if old.get(key) != new.get(key)]
    if differ:
        shown = ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")
        yield Finding(f"params.yaml differs from the commit: {shown}", "git checkout params.yaml, unless that was meant")


def _flat(content: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, content
