"""Artefacts of every kind with a bit flipped, or cut off: each is opened as its reader opens it, which must name the file."""

import random
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import torch
import writers

from pipeline.core import PipelineError, verify
from pipeline.features.store.store import FeatureStore
from pipeline.text.token_table import TokenTable
from pipeline.vlm.model import checkpoint


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
}


class Artefact:
    """What a writer has written, to be damaged one way after the other; counts what is found by name."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        writers.write(kind, folder)
        shutil.rmtree(folder / "store", ignore_errors=True)  # its links would be damaged too, and nobody reads it here
        self.files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "rejected.csv"]
        self.whole = {path: path.read_bytes() for path in self.files}
        for path in self.files:
            path.chmod(0o644)
        READERS[kind](folder)

    def flip(self, rng: random.Random) -> str:
        """Flip a bit, of any file; returns what is wrong with the answer, or nothing."""
        path = rng.choice(self.files)
        data, bit = bytearray(self.whole[path]), rng.randrange(8 * len(self.whole[path]))
        data[bit // 8] ^= 1 << bit % 8
        return self._try(path, bytes(data), f"bit {bit}")

    def cut(self, rng: random.Random) -> str:
        """Cut a file off, anywhere."""
        path = rng.choice(self.files)
        size = rng.randrange(len(self.whole[path]))
        return self._try(path, self.whole[path][:size], f"cut at {size}")

    def _try(self, path: Path, data: bytes, what: str) -> str:
        path.write_bytes(data)
        try:
            READERS[self.kind](self.folder)
        except PipelineError as error:
            line = error.line()
            return "" if path.name in line and "\n" not in line else f"{what} of {path.name}: told as {line}"
        except Exception as error:
            return f"{what} of {path.name}: {type(error).__name__}"
        finally:
            path.write_bytes(self.whole[path])
        return f"{what} of {path.name}: not noticed"
