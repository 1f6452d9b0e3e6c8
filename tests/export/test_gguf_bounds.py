"""GGUF files that count what is not there."""

import struct
from pathlib import Path

import pytest

from pipeline.core.errors import PipelineError
from pipeline.export.from_gguf import convert

Q, I = "<Q", "<I"  # noqa: E741


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack(Q, len(value) if length is None else length) + value


def head(tensors: int, entries: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries)


def entry(kind: int, body: bytes) -> bytes:
    return text(b"key") + struct.pack(I, kind) + body


FILES = {
    "empty": b"",
    "magic alone": b"GGUF",
    "another version": head(0, 0, 99),
    "endless metadata": head(0, 2**63),
    "endless tensors": head(2**63, 0),
    "more metadata than there is": head(0, 1000),
    "an endless key": head(0, 1) + text(b"key", 2**62),
    "an endless text": head(0, 1) + entry(8, text(b"", 2**40)),
    "an endless list": head(0, 1) + entry(9, struct.pack("<IQ", 0, 2**60)),
    "a list of as many bytes": head(0, 1) + entry(9, struct.pack("<IQ", 0, 30 << 20)) + bytes(30 << 20),
    "a list of lists": head(0, 1) + entry(9, struct.pack("<IQIQ", 9, 1, 9, 1) * 50),
    "an unknown kind": head(0, 1) + entry(77, b"abcd"),
    "a list of an unknown kind": head(0, 1) + entry(9, struct.pack("<IQ", 77, 1)),
    "many dimensions": head(1, 0) + text(b"t") + struct.pack(I, 2**31),
    "an endless tensor": head(1, 0) + text(b"t") + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0),
    "cut in a tensor": head(1, 0) + text(b"t") + struct.pack("<IQ", 2, 4),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_counts_what_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(FILES[name])
    with pytest.raises(PipelineError, match=r"model\.gguf: not a GGUF file, or cut off: "):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
