"""An answer's tokens as words."""

import numpy as np
import pytest

from pipeline.saliency.words import split_words


def words(pieces: list[bytes]) -> list[tuple[str, list[int]]]:
    def decode(ids: np.ndarray) -> str:
        return b"".join(pieces[i] for i in ids).decode("utf-8", errors="replace")

    return [(word, list(tokens)) for word, tokens in split_words(np.arange(len(pieces)), decode)]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"Red", b"."], [("Red", [0]), (".", [1])]),
        ([b"A", b" tri", b"angle", b"."], [("A", [0]), ("triangle", [1, 2]), (".", [3])]),
        ([b"Yes", b"", b"\n", b"no"], [("Yes", [0]), ("no", [3])]),
        (["红".encode()[:2], "红".encode()[2:], "色".encode()], [("红", [0, 1]), ("色", [2])]),
        ([b" ", b"cat", b" 4", b"2"], [("cat", [1]), ("42", [2, 3])]),
        ([b"cut ", "é".encode()[:1]], [("cut", [0]), ("\ufffd", [1])]),
        ([b" ", b"\n"], []),
        ([], []),
    ],
)
def test_words_and_their_tokens(pieces: list[bytes], expected: list[tuple[str, list[int]]]) -> None:
    assert words(pieces) == expected
