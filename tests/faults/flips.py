"""Single bits flipped and ends cut off in a folder of ours: is it noticed, and is the file named?

`unnoticed` changes one file after the other, opens the folder the way its reader does, and puts the file back. `READERS` says how
what `writers` leaves is opened. Bits of every part of a shard: `benchmarks/damage.py`.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import writers

from pipeline.core import PipelineError, verify
from pipeline.export.marker import read_marker
from pipeline.features.store.store import FeatureStore
from pipeline.text.token_table import TokenTable
from pipeline.vlm.model import checkpoint, load_language_model

Change = Callable[[bytes], bytes]


def changes(folder: Path, flips: int, cuts: int, seed: int) -> Iterator[tuple[str, str, Change]]:
    """File, what happens to it, and how: bits and places drawn over all bytes of the folder, but no cut that cuts nothing."""
    rng = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    for number in range(flips + cuts):
        # small files have their turn as well as large ones
        file = rng.choice(files) if number % 2 else rng.choices(files, sizes)[0]
        name, place = str(file.relative_to(folder)), rng.randrange(file.stat().st_size)
        if number < flips:
            mask = 1 << rng.randrange(8)
            yield name, f"bit {mask:#x} of byte {place}", lambda data, place=place, mask=mask: _flipped(data, place, mask)
        else:
            yield name, f"cut at {place}", lambda data, place=place: data[:place]


def _flipped(data: bytes, place: int, mask: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= mask
    return bytes(changed)


def trial(folder: Path, name: str, change: Change, opened: Callable[[Path], object]) -> str:
    """What is wrong with how the change was noticed; nothing where it was, in one line that names the file."""
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(change(data))
    try:
        opened(folder)
    except PipelineError as error:
        line = error.line()
        return "" if path.name in line and "\n" not in line else f"not named: {line}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        path.write_bytes(data)
    return "not noticed"


def unnoticed(folder: Path, opened: Callable[[Path], object], *, flips: int, cuts: int, seed: int = 0) -> list[str]:
    """The changes that went wrong, each with its file; `opened` must accept the folder as it is."""
    opened(folder)
    return [
        f"{name}: {what}: {problem}"
        for name, what, change in changes(folder, flips, cuts, seed)
        if (problem := trial(folder, name, change, opened))
    ]


def _features(folder: Path) -> None:
    store = FeatureStore(folder / "out")
    store.read(np.arange(len(store)))


def _state(folder: Path) -> None:
    """A state that is not whole is passed over by name, and an older one or none taken."""
    model = torch.nn.Linear(16, 16)
    said = StringIO()
    with redirect_stdout(said):
        history, _ = writers.training_state(folder).load(model, torch.optim.AdamW(model.parameters()), None)
    if not history:
        raise PipelineError(said.getvalue().strip())


READERS: dict[str, Callable[[Path], object]] = {
    "shards": _features,
    "tokens": lambda folder: TokenTable(folder / "tokens/pretrain.arrow"),
    "pictures": lambda folder: verify(folder / "meta", remedy="dvc repro"),
    "states": _state,
    "models": lambda folder: checkpoint.load(folder / "model"),
    "exports": lambda folder: read_marker(folder / "export"),
    "imports": lambda folder: load_language_model(str(folder / "llm")),
}


def artefact(kind: str, folder: Path) -> Path:
    """What a writer leaves, to be damaged: without what nobody verifies, and with no name that another file shares."""
    writers.ARTEFACTS[kind](folder)
    shutil.rmtree(folder / "store", ignore_errors=True)
    (folder / "rejected.csv").unlink(missing_ok=True)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder
