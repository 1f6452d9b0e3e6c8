"""Pictures decoded in workers: in batches as asked for, sent in pieces that a small shared memory holds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World

from pipeline.core.errors import PipelineError
from pipeline.features.decoding import AHEAD, SHARED, DecodedImages, ImageFile, decoded_batches, piece_of
from pipeline.features.distinct import distinct_images
from pipeline.records.images import ImageRoot, digest


@pytest.mark.parametrize("batch", [1, 10, 16, 256])
@pytest.mark.parametrize("workers", [0, 1, 2, 14, 62])
@pytest.mark.parametrize("side", [64, 224, 384, 1024])
def test_what_is_under_way_stays_within_the_shared_memory(batch: int, workers: int, side: int) -> None:
    picture = 3 * side**2
    piece = piece_of(batch, picture, workers)
    assert 1 <= piece <= batch
    assert piece == 1 or AHEAD * workers * piece * picture <= SHARED


def test_a_cpus_batch_is_sent_whole() -> None:
    assert piece_of(16, 3 * 224**2, 2) == 16


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_make_the_batches_that_were_asked_for(
    tmp_path: Path, png: Callable[[int], bytes], world: World, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order asked for, the bad ones told in their places, whatever the size of a piece."""
    for number in range(11):
        (tmp_path / f"{number}.png").write_bytes(b"bad" if number == 4 else png(number))
    root = ImageRoot(tmp_path)
    files = [ImageFile(root, f"{number}.png") for number in range(11)]
    keys = np.frombuffer(b"".join(digest(root.read(file.name)) for file in files), np.uint8).reshape(-1, 32)
    images, order = DecodedImages(files, keys, world.clip.preprocess), [3, 4, 10, 0, 9, 1, 8, 2, 7]
    found = []
    for shared in (10**9, AHEAD * max(workers, 1) * 3 * 32 * 32):
        monkeypatch.setattr("pipeline.features.decoding.SHARED", shared)
        found.append(list(decoded_batches(images, batch=4, workers=workers, order=order)))
        assert [len(errors) for _, errors, _ in found[-1]] == [4, 4, 1]
        bad = [number for number, error in zip(order, [e for _, errors, _ in found[-1] for e in errors], strict=True) if error]
        assert bad == [4]
    for (one, _, _), (other, _, _) in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_bad_pictures_has_no_pixels(tmp_path: Path, world: World) -> None:
    (tmp_path / "x.png").write_bytes(b"bad")
    files, hashes = distinct_images([(ImageRoot(tmp_path), ["x.png"])])
    ((pixels, errors, _),) = decoded_batches(DecodedImages(files, hashes, world.clip.preprocess), batch=4, workers=0)
    assert pixels is None
    assert isinstance(errors[0], PipelineError)
