"""What file systems other than a local disk's may refuse (NFS, SMB, FUSE): done where it can be, else said once and done without.

Nothing that is read depends on any of it: what is written carries checksums, and a run that ended early is run again. What a
disk must do (write, have room, give back what was written) is not among it.
"""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import final_name

REFUSALS = {
    errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK,
    errno.ENODEV, errno.EBADF, errno.EISDIR, errno.EXDEV,
}  # fmt: skip
_told = set[str]()


@contextmanager
def best_effort(deed: str, place: Path | str) -> Iterator[None]:
    """What is refused inside as not possible here is told once a process, and passed over; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        tell(deed, place, error)


def tell(deed: str, place: Path | str, error: OSError) -> None:
    """One line of warning, once a process for each deed."""
    if deed not in _told:
        _told.add(deed)
        line = f"warning: {place}: this file system does not {deed} ({error.strerror}); going on without"
        print(final_name(line), file=sys.stderr, flush=True)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of files, on the disk before anything else."""
    with best_effort("sync folders" if path.is_dir() else "sync files", path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def set_mode(path: Path | int, mode: int, *, where: Path | None = None) -> None:
    """Permissions of a file, by its path or while it is open."""
    with best_effort("change permissions", where or str(path)):
        if isinstance(path, int):
            os.fchmod(path, mode)
        else:
            os.chmod(path, mode)


def reserve(handle: int, size: int, *, where: Path) -> None:
    """Room for `size` bytes, so that a full disk is noticed now; where that cannot be asked for, the length alone."""
    try:
        os.posix_fallocate(handle, 0, size)
    except (OSError, AttributeError) as error:
        if isinstance(error, OSError):
            if error.errno not in REFUSALS:
                raise
            tell("reserve room ahead", where, error)
        os.ftruncate(handle, size)


def replace(temporary: Path, path: Path) -> None:
    """`temporary` takes the place of `path`, at once where renaming does that, else with a moment in which nothing is there."""
    try:
        os.replace(temporary, path)
        return
    except OSError as error:
        if error.errno not in REFUSALS | {errno.EEXIST, errno.ENOTEMPTY}:
            raise
        refusal = error
    aside = temporary.with_name(f"{temporary.name.removesuffix('.tmp')}-.tmp") if os.path.lexists(path) else None
    if aside:
        os.rename(path, aside)
    try:
        shutil.move(temporary, path)  # which copies where nothing can be renamed
    except BaseException:
        if aside:
            os.rename(aside, path)
        raise
    if aside and aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    elif aside:
        aside.unlink()
    tell("rename over what is there", path, refusal)
