"""What file systems other than a local disk's may refuse (NFS, SMB, FUSE): done where it can be, else said once and done without.

Nothing that is read depends on any of it: what is written carries checksums, and a run that ended early is run again. What a
disk must do (write, have room, give back what was written) is not among it.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.core.errors import final_name

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

REFUSALS = {
    errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOLCK,
    errno.ENODEV, errno.EBADF, errno.EISDIR, errno.EXDEV,
}  # fmt: skip
_told = set[str]()
T = TypeVar("T")


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
        line = f"warning: {place}: this file system does not {deed} ({error.strerror or error}); going on without"
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
        over_a_folder = path.is_dir() and not temporary.is_dir()  # a mistaken name, which must not cost what is in there
        if over_a_folder or error.errno not in REFUSALS | {errno.EEXIST, errno.ENOTEMPTY}:
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


def map_arrow(path: Path | str) -> "pa.NativeFile":
    """An Arrow file mapped into memory, or read where the file system maps none. Raises `OSError`."""
    import pyarrow as pa

    return _mapped(path, lambda: pa.memory_map(str(path)), lambda: pa.OSFile(str(path)))


def map_array(path: Path) -> "np.ndarray":
    """A NumPy file, likewise. Raises `OSError` and ValueError."""
    import numpy as np

    return _mapped(path, lambda: np.load(path, mmap_mode="r"), lambda: np.load(path))


def map_tensors(path: Path) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file, likewise. Raises `OSError` and `SafetensorError`."""
    from safetensors.torch import load, load_file

    return _mapped(path, lambda: load_file(path), lambda: load(path.read_bytes()))


def _mapped(path: Path | str, mapped: Callable[[], T], read: Callable[[], T]) -> T:
    """What `mapped` gives, or `read` where the former is refused: libraries do not pass on for which reason that was."""
    try:
        return mapped()
    except OSError as error:
        found = read()  # what is not there, or cannot be read, is not here either
        tell("map files into memory", path, error)
        return found
