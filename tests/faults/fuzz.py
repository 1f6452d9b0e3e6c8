"""Inputs from outside with random damage: each is used or refused in one line, in time and memory, and no row is lost.

An input is what was damaged: a picture, a row, a file.
"""

import io
import json
import random
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bombs import BOMBS
from faults import at_most, drain, total
from gguf import GGUFWriter
from PIL import Image

from benchmarks.kills import run
from pipeline.core import PipelineError
from pipeline.export.from_gguf import convert
from pipeline.params.reading import check, read_yaml
from pipeline.records import decode
from pipeline.records.formats import SourceSpec
from pipeline.records.images import ImageError, ImageRoot
from pipeline.text import PromptBuilder
from pipeline.vlm.model.language_model import load_language_model

LIMIT = 10  # seconds
MEMORY = 2 << 30  # bytes


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
    """A file of twelve rows in lines, half of them damaged; those that are read and those that are listed are all that it has."""
    lines = [json.dumps(rng.choice(ROWS)).encode() for _ in range(12)]
    for number in rng.sample(range(12), 6):
        lines[number] = mutated(lines[number], rng).replace(b"\n", b" ").replace(b"\r", b" ") or b"x"
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    found = drain(SourceSpec(str(path), images=str(folder)))
    blank = sum(not line.strip() for line in lines)
    if total(found) + blank != 12:
        raise AssertionError(f"{total(found)} of {12 - blank} rows")
    return 6


def _files() -> dict[str, bytes]:
    """A small sound file of each kind that rows or pictures come in."""
    pixels, captions = _pictures()[0], ["A red square."] * 6
    table = pa.table({"image": [{"bytes": pixels, "path": "x"}] * 6, "caption": captions})
    out = {"csv": b"image,caption\n" + b"a.png,A red square.\n" * 12, "json": json.dumps([*ROWS, *ROWS], indent=1).encode()}
    for codec in ("snappy", "zstd"):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=4, compression=codec, use_dictionary=codec == "zstd", write_page_checksum=True)
        out[f"{codec}.parquet"] = sink.getvalue().to_pybytes()
    for codec in (None, "lz4", "zstd"):
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
            file.write_table(table, max_chunksize=4)
        out[f"{codec}.arrow"] = sink.getvalue().to_pybytes()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    out["stream.arrow"] = sink.getvalue().to_pybytes()
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as members:
        for number in range(4):
            for name, data in ((f"{number}.png", pixels), (f"{number}.txt", b"A red square.")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                members.addfile(member, io.BytesIO(data))
    return {**out, "tar": tar.getvalue()}


def table(rng: random.Random, folder: Path, seeds: tuple[tuple[str, bytes], ...] = tuple(_files().items())) -> int:
    """A whole file of rows, read with its pictures."""
    kind, data = rng.choice(seeds)
    path = folder / f"rows.{kind}"
    path.write_bytes(mutated(data, rng))
    drain(SourceSpec(str(path), images="" if "." in kind or kind == "tar" else str(folder)), read=True)
    return 1


def bomb(rng: random.Random, folder: Path) -> int:
    """A small file that says it is large; made in a process of its own, so that only its reading takes memory here."""
    kind = rng.choice(list(BOMBS))
    run(partial(BOMBS[kind], folder / kind, 32 << 20))
    drain(SourceSpec(str(folder / kind)), read=True)
    (folder / kind).unlink()
    return 1


def _zips() -> list[bytes]:
    out = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for number, data in enumerate(_pictures()[:3]):
                archive.writestr(f"{number}.png", data)
        out.append(file.getvalue())
    return out


def archive(rng: random.Random, folder: Path, seeds: list[bytes] = _zips()) -> int:  # noqa: B008
    path = folder / "images.zip"
    path.write_bytes(mutated(rng.choice(seeds), rng))
    images = ImageRoot(path)
    for number in range(3):
        try:
            decode(images.read(f"{number}.png"), where="x.png")
        except ImageError as error:
            if len(error.line().splitlines()) != 1:
                raise AssertionError(error.line()) from None
    return 1


def params(rng: random.Random, folder: Path, text: bytes = Path("params.yaml").read_bytes()) -> int:
    path = folder / "params.yaml"
    path.write_bytes(mutated(text, rng))
    check(read_yaml(path), where="params.yaml")
    return 1


MODEL = Path("data/models/llm")
PARTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def model(rng: random.Random, folder: Path) -> int:
    """A language model's folder from the internet, one of its files damaged: the tokenizer with its template, or the weights."""
    name = rng.choice((*PARTS, "model.safetensors"))
    place = folder / "model"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path in MODEL.iterdir():
        (place / path.name).symlink_to(path.resolve())
    data = (MODEL / name).read_bytes()
    (place / name).unlink()
    head = data[:4096] if name.endswith("safetensors") else data  # its header, which is what says where everything is
    (place / name).write_bytes(mutated(head, rng) + data[len(head) :])
    if name in ("config.json", "model.safetensors"):
        load_language_model(str(place))
    else:
        PromptBuilder(str(place), image_token="<image>", tokens=4).check()
    return 1


def _gguf() -> bytes:
    path = Path(tempfile.mkdtemp()) / "model.gguf"
    writer = GGUFWriter(path, "llama")
    for name, value in (("llama.block_count", 1), ("llama.context_length", 64), ("llama.embedding_length", 16)):
        writer.add_uint32(name, value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(32)])
    writer.add_chat_template(CHAT)
    writer.add_tensor("token_embd.weight", np.zeros((32, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.read_bytes()
    shutil.rmtree(path.parent)
    return data


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def gguf(rng: random.Random, folder: Path, data: bytes = _gguf()) -> int:
    path = folder / "model.gguf"
    path.write_bytes(mutated(data[:1024], rng) + data[1024:])
    convert(path, folder / "out")
    return 1


BORDERS: dict[str, Callable[[random.Random, Path], int]] = {
    "pictures": picture, "rows": rows, "tables": table, "archives": archive, "params": params, "models": model, "gguf": gguf,
    "bombs": bomb,
}  # fmt: skip
SHARES = {
    "pictures": 0.667,
    "rows": 0.253,
    "tables": 0.04,
    "archives": 0.02,
    "params": 0.007,
    "models": 0.003,
    "gguf": 0.01,
    "bombs": 0.0002,
}


def batches(count: int, size: int) -> list[tuple[str, int]]:
    """Borders and numbers of inputs, `count` at least in all; a border's batch is smaller where an input takes longer."""
    out: list[tuple[str, int]] = []
    for border, share in SHARES.items():
        each, wanted = max(1, size // 20) if border in ("params", "models", "bombs") else size, max(1, round(share * count))
        out += [(border, min(each, wanted - at)) for at in range(0, wanted, each)]
    random.Random(0).shuffle(out)  # so that a portion of them is of every border
    return out


def fuzz(border: str, count: int, rng: random.Random, folder: Path) -> tuple[int, list[str]]:
    """At least so many inputs at a border; returns their number and what went wrong."""
    done, failures = 0, []
    while done < count:
        before = rng.getstate()
        try:
            with at_most(LIMIT):
                done += BORDERS[border](rng, folder)
        except PipelineError as error:
            done += 6 if border == "rows" else 1
            if len(error.line().splitlines()) != 1:
                failures.append(f"{border}: several lines: {error.line()!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            done += 1
            failures.append(f"{border}: {type(error).__name__}: {error} (state {hash(before)})")
    return done, failures


def apart(border: str, count: int, seed: str, scratch: Path) -> tuple[int, list[str], int]:
    """As `fuzz`, in a process of its own; also the most bytes of memory that it took."""
    told = scratch / "told.json"
    told.unlink(missing_ok=True)

    def work() -> None:
        told.write_text(json.dumps(fuzz(border, count, random.Random(seed), scratch)), encoding="utf-8")

    ended = run(work, limit=LIMIT * count)
    if ended.code or not told.exists():
        return count, [f"{border} (seed {seed}): ended with {ended.code}: {ended.text[-300:]!r}"], ended.memory
    done, failures = json.loads(told.read_text(encoding="utf-8"))
    if ended.memory > MEMORY:
        failures.append(f"{border} (seed {seed}): {ended.memory >> 20:,} MB of memory")
    return done, [f"{failure} (seed {seed})" for failure in failures], ended.memory
