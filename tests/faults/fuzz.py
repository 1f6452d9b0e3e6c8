"""Inputs from outside with random damage: each is used or refused in one line, in time, and no row is lost."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from faults import at_most, drain, total
from PIL import Image

from pipeline.core import PipelineError
from pipeline.params.reading import check, read_yaml
from pipeline.records import decode
from pipeline.records.formats import SourceSpec

LIMIT = 10  # seconds


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, a piece left out, doubled or put elsewhere, or the end cut off."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(out)) if out else 0
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randrange(1, 33)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randrange(1, 65)]
        elif kind == 3:
            out[at:at] = rng.choice((b"\xff" * 4, b"\0" * 4, b'"', b"{", b"]", b"\n", b"9" * 30, b"\\ud800", b"<image>", b"NaN"))
        else:
            del out[rng.randrange(len(out) + 1) :]
    return bytes(out)


def _pictures() -> list[bytes]:
    found = []
    for kind, mode in (("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB")):  # fmt: skip
        pixels = np.random.default_rng(len(found)).integers(0, 256, (20, 24, 3), np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(file, kind)
        found.append(file.getvalue())
    return found


def picture(rng: random.Random, _: Path, seeds: list[bytes] = _pictures()) -> int:  # noqa: B008
    decode(mutated(rng.choice(seeds), rng), where="x.png")
    return 1


ROWS = [
    {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "This."}], "images": ["a.png"]},
    {"image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]},
    {"image": "a.png", "caption": "A red square."},
]


def rows(rng: random.Random, folder: Path) -> int:
    """A file of twelve rows in lines; those that are read and those that are listed are all that it has."""
    lines = [json.dumps(rng.choice(ROWS)).encode() for _ in range(12)]
    for number in rng.sample(range(12), 3):
        lines[number] = mutated(lines[number], rng).replace(b"\n", b" ").replace(b"\r", b" ") or b"x"
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = drain(SourceSpec(str(path), images=str(folder)))
    blank = sum(not line.strip() for line in lines)
    if total(found) + blank != 12:
        raise AssertionError(f"{total(found)} of {12 - blank} rows")
    return 12


def table(rng: random.Random, folder: Path) -> int:
    path = folder / "rows.csv"
    path.write_bytes(mutated(b"image,caption\n" + b"a.png,A red square.\n" * 12, rng))
    drain(SourceSpec(str(path), images=str(folder)))
    return 12


def params(rng: random.Random, folder: Path, text: bytes = Path("params.yaml").read_bytes()) -> int:
    path = folder / "params.yaml"
    path.write_bytes(mutated(text, rng))
    check(read_yaml(path), where="params.yaml")
    return 1


BORDERS: dict[str, Callable[[random.Random, Path], int]] = {"pictures": picture, "rows": rows, "tables": table, "params": params}


def fuzz(border: str, count: int, rng: random.Random, folder: Path) -> tuple[int, list[str]]:
    """At least so many inputs at a border; returns their number and what went wrong."""
    done, failures = 0, []
    while done < count:
        before = rng.getstate()
        try:
            with at_most(LIMIT):
                done += BORDERS[border](rng, folder)
        except PipelineError as error:
            done += 12 if border in ("rows", "tables") else 1
            if len(error.line().splitlines()) != 1:
                failures.append(f"{border}: several lines: {error.line()!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            done += 1
            failures.append(f"{border}: {type(error).__name__}: {error} (state {hash(before)})")
    return done, failures
