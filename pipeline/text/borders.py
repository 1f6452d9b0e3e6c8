"""Whether template and contents may be encoded apart: where a tokenizer ends a token at every border between them."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

_LOCAL = frozenset(("NFC", "NFD", "NFKC", "NFKD"))  # normalizers that look at no neighbour across a line break
_EDGES = "aZé猫я0٣²_-.,'\"(\u0301<{[*#$%&🐈\u200d"  # first letters of contents, of each kind that a pattern tells apart


class Borders:
    """What is known of a tokenizer's borders.

    Between an added token and a text there is always one. Byte-level tokenizers have one between a line break and a letter too.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, image_token: str) -> None:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        tokens = {token["content"]: token for token in state["added_tokens"] if token["content"].strip()}
        self._before = tuple(text for text, token in tokens.items() if not token["rstrip"])
        self._after = tuple(text for text, token in tokens.items() if not token["lstrip"])
        image = tokens.get(image_token, {"lstrip": False, "rstrip": False})
        strips = image["lstrip"] or image["rstrip"]
        self._sees = not strips and _is_byte_level(state) and _breaks_lines(tokenizer)

    def are_seen(self, pieces: Sequence[str]) -> bool:
        """Whether each content between these pieces of the template stands alone."""
        return (
            self._sees
            and all(piece.endswith(("\n", *self._before)) for piece in pieces[:-1])
            and all(piece.startswith(self._after) for piece in pieces[1:])
        )


def _is_byte_level(state: dict[str, Any]) -> bool:
    normalizers = {part["type"] for part in _parts(state["normalizer"], "normalizers")}
    before = list(_parts(state["pre_tokenizer"], "pretokenizers"))
    levels = [part for part in before if part["type"] == "ByteLevel"]
    alone = all(part["type"] in ("ByteLevel", "Split", "Digits", "Punctuation") for part in before)
    return normalizers <= _LOCAL and bool(levels) and alone and not any(part["add_prefix_space"] for part in levels)


def _parts(state: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    if state is None:
        return
    if state["type"] == "Sequence":
        for part in state[name]:
            yield from _parts(part, name)
    else:
        yield state


def _breaks_lines(tokenizer: PreTrainedTokenizerFast) -> bool:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return all(encode(f"a\n{edge}b") == encode("a\n") + encode(f"{edge}b") for edge in _EDGES)
