"""An answer's token ids -> its words, and which tokens make each."""

from collections.abc import Callable, Sequence

import numpy as np

WIDE = 0x2E80  # from here on scripts that put no blanks between words: each token is shown on its own


def split_words(ids: np.ndarray, decode: Callable[[np.ndarray], str]) -> list[tuple[str, range]]:
    """Words and their tokens in order; a mark behind a word is one of its own, and tokens that show nothing belong to none.

    `decode`: ids -> text. A letter's bytes may be spread over several tokens: those are kept together.
    """
    pieces: list[tuple[str, range]] = []
    said, first = "", 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[:end])
        if text.endswith("\ufffd") and end < len(ids):
            continue
        pieces.append((text[len(said) :], range(first, end)))
        said, first = text, end
    return _join([(piece, tokens) for piece, tokens in pieces if piece.strip()])


def _join(pieces: Sequence[tuple[str, range]]) -> list[tuple[str, range]]:
    words: list[tuple[str, range]] = []
    last = " "
    for piece, tokens in pieces:
        shown = piece.strip()
        apart = last.isspace() or piece[0].isspace() or last.isalnum() != shown[0].isalnum() or ord(shown[0]) >= WIDE
        if words and not apart and tokens.start == words[-1][1].stop:
            words[-1] = words[-1][0] + shown, range(words[-1][1].start, tokens.stop)
        else:
            words.append((shown, tokens))
        last = piece[-1]
    return words
