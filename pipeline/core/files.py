"""Files that appear whole or not at all: temporary name, fsync, rename, fsync of the folder."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.core.checksums import sign, to_json
from pipeline.core.disk import replace, set_mode, sync
from pipeline.core.errors import RESOURCE, PipelineError, brief
from pipeline.core.locks import is_abandoned, machine, own, release

RACES = 100  # that others may win for a folder's place
TEMPORARY = re.compile(r"\.(.+)\.(\d{1,18})@([^.]*)\.tmp")  # .NAME.PROCESS@MACHINE.tmp


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside is told as `path` that cannot be written; so nothing else may be done inside.

    Libraries written in Rust and torch have words of their own for a full disk. Raises `PipelineError`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError | SafetensorError) or any(mark in str(error) for mark in ("(os error", "unexpected pos")):
            raise _unwritable(path, error) from None
        raise


def _unwritable(path: Path, error: Exception) -> PipelineError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror and "\n" not in error.strerror else brief(error)
    return PipelineError(f"cannot be written: {reason}", where=str(path), code=RESOURCE)


@contextmanager
def publish(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, which takes its place, synced, when the block ends without an error.

    Only what is refused here, or names the temporary path, is told as `path` that cannot be written: a block that reads as it
    writes puts its writes under `writing`.
    """
    temporary = temporary_name(path)
    with writing(path):
        _make(path.parent)
        remove_leftovers(path.parent, path.name)
        handle = own(temporary, folder=False)
    try:
        yield temporary
        with writing(path):
            sync(temporary)
            replace(temporary, path)
            sync(path.parent)
    except OSError as error:
        raise (_unwritable(path, error) if _names(error, temporary) else error) from None
    finally:
        with suppress(OSError):
            temporary.unlink()
        release(handle)


def _names(error: OSError, temporary: Path) -> bool:
    """Whether an error says that it is about a temporary path, or what lies below it."""
    found = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes | os.PathLike)]
    return any(path == temporary or temporary in path.parents for path in found)


def make_folder(path: Path) -> None:
    """A folder and its parents, where they are not there yet."""
    try:
        _make(path)
    except OSError as error:
        raise PipelineError(f"cannot be made: {error.strerror or error}", where=str(path), code=RESOURCE) from None


def _make(folder: Path) -> None:
    """A folder and its parents, those that are new on the disk before anything is written into them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        sync(each.parent)


def write_json(path: Path, content: Any) -> None:
    """JSON, written whole or not at all."""
    text = to_json(content)
    with publish(path) as temporary, writing(path):
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """As `publish` for a folder: whatever stood at `path` is replaced by the finished new one, its `checksums.json` with it."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # a link to a folder on another disk stays one
    temporary = temporary_name(path)
    with writing(path):
        _make(path.parent)
        remove_leftovers(path.parent, path.name)
        handle = own(temporary, folder=True)
    try:
        yield temporary
        with writing(path):
            sign(temporary)
            for file in sorted(temporary.rglob("*")):
                sync(file)
            sync(temporary)
            _replace_folder(temporary, path)
            sync(path.parent)
    except OSError as error:
        raise (_unwritable(path, error) if _names(error, temporary) else error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        release(handle)


def _replace_folder(temporary: Path, path: Path) -> None:
    """`temporary` takes the place of the folder `path`, which is renamed away as a whole: another run may be doing the same."""
    aside = temporary.with_name(f"{temporary.name.removesuffix('.tmp')}-old.tmp")
    for _ in range(RACES):
        moved = _is_renamed(f"{path}/", aside)  # of a folder alone
        try:
            os.replace(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                shutil.rmtree(aside, ignore_errors=True)
                continue
            if moved:
                os.rename(aside, path)
            break
        shutil.rmtree(aside, ignore_errors=True)
        return
    else:  # the file system renames no folder that is not empty
        shutil.rmtree(path, ignore_errors=True)
    replace(temporary, path)


def _is_renamed(path: str, target: Path) -> bool:
    try:
        os.rename(path, target)
        return True
    except OSError:
        return False


def link_or_copy(source: Path, target: Path) -> bool:
    """Give `target` the content of `source` at no cost where the filesystem links; True when it was linked."""
    try:
        os.link(source, target)
        return True
    except OSError:
        with publish(target) as temporary, writing(target):
            shutil.copyfile(source, temporary)
            set_mode(temporary, stat.S_IMODE(source.stat().st_mode))  # a link would have the source's, too
        return False


def temporary_name(path: Path) -> Path:
    """Where the content of `path` stands until it is whole: beside it, named by process and machine (see `remove_leftovers`)."""
    return path.with_name(f".{path.name}.{os.getpid()}@{machine()}.tmp")


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Delete temporary files and folders whose writers are gone, all in `folder` or those of one output `name`.

    A writer holds a lock on what it writes, which ends with it; what a living one writes, here or elsewhere, stays.
    """
    try:
        found = [match for entry in os.listdir(folder) if (match := TEMPORARY.fullmatch(entry))]
    except OSError:
        return
    for match in found:
        path = folder / match[0]
        if name not in (None, match[1]) or (handle := is_abandoned(path, int(match[2]), match[3])) is None:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            path.unlink()
        release(handle)


def is_left_over(path: Path) -> bool:
    """Whether a path is a temporary one whose writer is gone."""
    match = TEMPORARY.fullmatch(path.name)
    handle = is_abandoned(path, int(match[2]), match[3]) if match else None
    if handle is None:
        return False
    release(handle)
    return True


def main_checkout(folder: Path | None = None) -> Path:
    """The checkout that owns this workspace: DVC's temporary workspaces lie under its .dvc folder."""
    here = (folder or Path()).resolve()
    for parent in here.parents:
        if parent.name == ".dvc":
            return parent.parent
    return here
