"""A model's folder from outside, looked at before a library believes it: what it says of itself must fit into memory.

Libraries parse whole files and make room for whatever a configuration promises; so sizes are bounded here, from the lengths
of files, the headers of weights, and the weights that are really there.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import ARTEFACT, PipelineError, brief

MIB = 1 << 20
MAX_JSON = 16 * MIB
MAX_VOCABULARY = 128 * MIB  # Gemma's tokenizer.json has 34 MB
MAX_HEADER = 32 * MIB  # of a safetensors file: some hundred thousand tensors
MAX_LAYERS = 1000
MAX_SIZE = 1 << 23  # of anything that a configuration calls a size: rows of a vocabulary are the most
_VOCABULARY = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"}
_SIZES = ("size", "dim", "width", "heads", "experts", "embd", "inner", "channels")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def check_model(model: str, *, where: str, revision: str = "") -> None:
    """Raises `PipelineError` for a folder that is not there or is no folder, and for files that no honest model has.

    A hub's id passes where nothing of it is at hand. `where` is the parameter that named `model`.
    """
    folder = Path(model)
    if _is_path(model):
        if not folder.exists():
            raise PipelineError(f"no such folder: {model}", where=where, remedy="name one, or a hub id", code=ARTEFACT)
        if not folder.is_dir():
            hint = "python -m pipeline.from_gguf makes one" if folder.suffix == ".gguf" else "name the folder it lies in"
            raise PipelineError(f"{model} is a file, expected a folder", where=where, remedy=hint, code=ARTEFACT)
    elif (found := _cached(model, revision)) is None:
        return
    else:
        folder = found
    try:
        for problem in _problems(folder):
            raise PipelineError(f"cannot load {model}: {problem}", where=where, remedy="take another model", code=ARTEFACT)
    except (OSError, ValueError, RecursionError) as error:
        raise PipelineError(f"cannot load {model}: {brief(error)}", where=where, code=ARTEFACT) from None


def _is_path(model: str) -> bool:
    """Hub ids are NAME or OWNER/NAME; whatever is there, or cannot be one of those, is a path."""
    return model.startswith(("/", "./", "../", "~", ".")) or model.count("/") > 1 or "\\" in model or Path(model).exists()


def _cached(model: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision or None)
    except (HFValidationError, ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def _problems(folder: Path) -> Iterator[str]:
    for file in sorted(folder.iterdir()):
        is_text = file.suffix in (".json", ".jinja", ".txt", ".model")
        if is_text or file.suffix == ".safetensors":
            if not file.is_file():
                yield f"{file.name} is no file"
                continue
            size, most = file.stat().st_size, MAX_VOCABULARY if file.name in _VOCABULARY else MAX_JSON
            if is_text and size > most:
                yield f"{file.name} has {size:,} bytes, more than {most:,}"
        if file.suffix == ".safetensors":
            yield from _header(file)
    yield from _config(folder)


def _header(file: Path) -> Iterator[str]:
    with file.open("rb") as content:
        start = content.read(8)
    size = file.stat().st_size
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(MAX_HEADER, size - 8):
        yield f"{file.name} has a header of {length:,} bytes, in a file of {size:,}; {MAX_HEADER:,} are the most"


def _config(folder: Path) -> Iterator[str]:
    """Sizes beyond any model, and more weights promised than files hold."""
    path = folder / "config.json"
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        yield "config.json holds no object"
        return
    held = sum(file.stat().st_size for pattern in _WEIGHTS for file in folder.glob(pattern))
    for section in _sections(content):
        for key, value in section.items():
            most = MAX_LAYERS if "layer" in key else MAX_SIZE if any(word in key for word in _SIZES) else None
            if most and isinstance(value, int) and not isinstance(value, bool) and value > most:
                yield f"config.json: {key} is {value:,}, more than {most:,}"
        if held and (promised := _promised(section)) > 16 * held:  # of a number, two bits at least
            yield f"config.json promises {promised:,} weights and more, its files have {held:,} bytes"


def _sections(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from _sections(value)


def _promised(section: dict[str, Any]) -> int:
    """How many numbers the largest tables have; 0 where they are not described in the usual words."""

    def number(*names: str) -> int:
        return next((section[name] for name in names if isinstance(section.get(name), int)), 0)

    hidden = number("hidden_size", "n_embd", "d_model")
    return hidden * max(number("vocab_size"), number("num_hidden_layers", "n_layer") * hidden)
