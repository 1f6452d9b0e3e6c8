"""Some rows of a token table that stand for all: spread over the whole file and over its pictures."""

import numpy as np
import pyarrow as pa

SEED = 0  # fixed: every experiment is asked the same


def spread_rows(images: pa.ChunkedArray, limit: int) -> np.ndarray:
    """int64 [limit], sorted: a row of each of as many pictures as there are, drawn at random, then a second row of them, and so on.

    Args:
        images: list<binary(32)> [N], the hashes of each row's pictures. A row counts as one about its first picture, and a row
            without one as one about a picture of its own.
    """
    order = np.random.default_rng(SEED).permutation(len(images))
    pictures = _first_pictures(images)[order]
    by_picture = np.argsort(pictures, kind="stable")
    found = pictures[by_picture]
    begins = np.flatnonzero(np.concatenate([[True], found[1:] != found[:-1]]))
    turn = np.empty(len(order), np.int64)  # of each row in `order`: the how many-th about its picture it is
    turn[by_picture] = np.arange(len(order)) - np.repeat(begins, np.diff(np.concatenate([begins, [len(order)]])))
    return np.sort(order[np.argsort(turn, kind="stable")[:limit]])


def _first_pictures(images: pa.ChunkedArray) -> np.ndarray:
    """uint64 [N]: a picture's number, from its hash; a row's own where it shows none."""
    found, first = np.arange(len(images), dtype=np.uint64), 0
    for chunk in images.chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values
        hashes = np.frombuffer(values.buffers()[1], np.uint8)[values.offset * 32 : (values.offset + len(values)) * 32]
        shows = np.flatnonzero(np.diff(offsets) > 0)
        found[first + shows] = hashes.reshape(-1, 32)[offsets[:-1][shows], :8].copy().view("<u8")[:, 0]
        first += len(chunk)
    return found
