"""Decoding, encoding and writing at the same time: bounded, in order, and all of them ended by the failure of one."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World

from pipeline.core.errors import PipelineError
from pipeline.features import decoder_pool
from pipeline.features.decoding import DecodedImages
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.encoding import Encoding
from pipeline.features.extraction import extract
from pipeline.features.store import shards
from pipeline.features.stream import IN_FLIGHT, FeatureStream
from pipeline.records.images import ImageRoot

COUNT, BATCH = 24, 2


@pytest.fixture
def images(tmp_path: Path, png: Callable[[int], bytes]) -> ImageRoot:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(COUNT):
        (folder / f"{number}.png").write_bytes(png(number))
    return ImageRoot(folder)


class Noting(Encoder):
    """Counts the batches it has begun, and who did; `fails` at one of them."""

    def begin(self, pixels: torch.Tensor, names: Sequence[str]) -> Encoding:
        seen = self.__dict__.setdefault("seen", [])
        seen.append(threading.current_thread())
        if len(seen) == self.__dict__.get("fails"):
            raise PipelineError("gone", where="the encoder")
        return super().begin(pixels, names)


@pytest.fixture
def encoder(world: World) -> Noting:
    return Noting(world.clip.name, precision="float32", device=torch.device("cpu"), batch=BATCH)


@pytest.fixture
def nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread and no process outlives what began it."""
    before, forked, plain = set(threading.enumerate()), list[int](), decoder_pool.fork_process
    monkeypatch.setattr(decoder_pool, "fork_process", lambda work: forked.append(plain(work)) or forked[-1])
    yield
    until = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < until:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before
    for process in forked:
        with pytest.raises(ChildProcessError):
            os.waitpid(process, os.WNOHANG)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_encoded_ahead_of_who_takes_their_rows_but_only_so_many(
    images: ImageRoot, encoder: Noting, workers: int
) -> None:
    files, hashes = distinct_images([(images, [f"{number}.png" for number in range(COUNT)])])
    stream = FeatureStream(DecodedImages(files, hashes, encoder.preprocess), encoder, workers, skip=False, total=COUNT, quiet=True)
    expected = Encoder.encode_files(encoder, [file.root.read(file.name) for file in files], [file.name for file in files]).numpy()
    encoder.__dict__["seen"] = seen = list[threading.Thread]()
    stream.begin(range(COUNT))
    for number in range(COUNT):
        row = next(stream)
        assert row is not None
        assert np.array_equal(row, expected[number])
        begun = min(number // BATCH + 1 + IN_FLIGHT, COUNT // BATCH)
        until = time.monotonic() + 60
        while len(seen) < begun and time.monotonic() < until:  # by itself, while nobody asks
            time.sleep(0.001)
        assert len(seen) == begun
    assert len(seen) == COUNT // BATCH
    assert threading.current_thread() not in seen
    stream.close()


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["encoder", "writer"])
def test_a_failure_of_the_encoder_or_of_the_writer_ends_decoding_and_the_other(
    images: ImageRoot, encoder: Noting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, workers: int
) -> None:
    plain, writes = shards._write_all, list[int]()

    def write(handle: int, view: memoryview, offset: int) -> None:
        writes.append(len(view))
        if part == "writer" and len(writes) == 3:
            raise OSError(28, "No space left on device")
        plain(handle, view, offset)

    monkeypatch.setattr(shards, "_write_all", write)
    encoder.__dict__["fails"] = 7 if part == "encoder" else 0
    files, hashes = distinct_images([(images, [f"{number}.png" for number in range(COUNT)])])
    options = {"stores": [tmp_path / "store"], "out": tmp_path / "out", "shard_rows": 4, "workers": workers}
    with pytest.raises(PipelineError, match="gone" if part == "encoder" else "No space left"):
        extract(files, hashes, encoder, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "store").rglob("*.tmp"))
    assert not list((tmp_path / "store").rglob("*.claim"))
    encoder.__dict__["fails"] = 0
    monkeypatch.setattr(shards, "_write_all", plain)
    whole = extract(files, hashes, encoder, **options)  # type: ignore[arg-type]
    assert whole.images == COUNT
    assert whole.encoded <= COUNT - (4 if part == "encoder" else 0), "finished shards are taken over"
