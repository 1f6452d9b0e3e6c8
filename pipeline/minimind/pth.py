"""A `.pth` weight file <-> a dictionary of tensors.

Reads PyTorch's zip format without running anything that the file contains, and checks what torch.load does not: its
checksums. Writes the same format, whole or not at all.
"""

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from pipeline.core import ARTEFACT, PipelineError, brief, publish, writing
from pipeline.core.devices import DTYPES

_GLOBAL = re.compile(r"GLOBAL (\S+)")


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the file by name, mapped from disk; of a training state (`*_resume.pth`), those of its model.

    Raises `PipelineError` for a missing, cut or damaged file, one that holds code, anything but a dictionary of float
    tensors, and values that are not finite.
    """
    content = _load(path)
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        found = "nothing" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise PipelineError(f"expected a dictionary of tensors, got {found}", where=str(path), code=ARTEFACT)
    for name, tensor in content.items():
        _check_tensor(path, name, tensor)
    return content


def _load(path: Path) -> Any:
    _check_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's on pickle protocols: what matters comes as an error
            return torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a damaged or hostile pickle raises anything
        if found := _GLOBAL.search(str(error)):
            raise PipelineError(
                f"holds more than tensors ({found[1]}), and code from a file is never run",
                where=str(path),
                remedy="give a file that holds a state_dict only",
                code=ARTEFACT,
            ) from None
        why = brief(error, limit=80) if isinstance(error, RuntimeError) else "its pickle cannot be read"
        raise PipelineError(f"not a weight file: {why}", where=str(path), code=ARTEFACT) from None


def _check_bytes(path: Path) -> None:
    """The zip directory is there and every checksum holds; torch.load reads a flipped bit without a word."""
    try:
        if not path.is_file():
            raise PipelineError("no such file", where=str(path), remedy="give a MiniMind .pth file")
        with path.open("rb") as file:
            begin = file.read(24)
        if not begin.startswith(b"PK\x03\x04"):
            shown = f"begins with {begin!r}" if begin else "is empty"
            remedy = "download it again; files from before PyTorch 1.6 are not read"
            raise PipelineError(f"not a PyTorch weight file: it {shown}", where=str(path), remedy=remedy, code=ARTEFACT)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise PipelineError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError):
        size = path.stat().st_size
        raise PipelineError(
            f"cut off or damaged at {size:,} bytes", where=str(path), remedy="copy it again", code=ARTEFACT
        ) from None
    if damaged:
        raise PipelineError(f"damaged: {damaged} fails its checksum", where=str(path), remedy="copy it again", code=ARTEFACT)


def _check_tensor(path: Path, name: Any, tensor: Any) -> None:
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        found = f"{name!r} is a {type(tensor).__name__}"
        raise PipelineError(f"expected tensors only, but {found}", where=str(path), code=ARTEFACT)
    if tensor.dtype not in DTYPES.values() or tensor.layout != torch.strided:
        known = ", ".join(DTYPES)
        raise PipelineError(f"{name} is {tensor.dtype}, expected one of {known}", where=str(path), code=ARTEFACT)
    check_finite(name, tensor, where=str(path))


def check_finite(name: str, tensor: torch.Tensor, *, where: str, remedy: str = "") -> None:
    """Raises `PipelineError` where a value is not-a-number or infinite."""
    if not torch.isfinite(tensor).all():
        raise PipelineError(f"{name} is not finite", where=where, remedy=remedy, code=ARTEFACT)


def write_pth(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the tensors in their order; the same tensors give the same bytes under any name."""
    with publish(path) as temporary, writing(path), temporary.open("wb") as file:
        torch.save(tensors, file)
