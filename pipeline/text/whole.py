"""A conversation's whole text -> ids, for tokenizers that look over the border between template and content.

SentencePiece gives a word after a space another id than at a beginning, byte-level BPE joins line breaks. So the text is encoded in
one piece, as `apply_chat_template` does, and what stands where follows from the characters each token covers. The tokenizer is a
copy that knows its control tokens by private spellings: the template's are written so, and a content that spells one stays text.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pipeline.text.marking import IMAGE, Segment, refused
from pipeline.text.prompts import ID, Prompt

_BEGIN, _END = "\U0010fff4", "\U0010fff5"


@dataclass(slots=True)
class Script:
    """The text of one conversation: `answers` are where the characters of each begin and end, `slots` its images in order."""

    text: str = ""
    answers: list[tuple[int, int]] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)


class WholeEncoder:
    """Encodes whole conversations for one tokenizer.

    Args:
        control: spelling and id of the tokens that only a template writes.
        image: spelling and id of the token that stands for an image, P of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: dict[str, int], image: tuple[str, int], tokens: int) -> None:
        names = {spelling: f"{_BEGIN}{place}{_END}" for place, spelling in enumerate(control)}
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["post_processor"] = state["truncation"] = state["padding"] = None
        _rename(state, names)
        flags = next((token for token in state["added_tokens"] if token["content"] == names.get(image[0])), None)
        standing = {"normalized": False, "special": True, "single_word": False, "lstrip": False, "rstrip": False} | (flags or {})
        state["added_tokens"].append(standing | {"content": IMAGE, "id": 1 + max(tokenizer.get_vocab().values())})
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        self._tokens, self._image_id = tokens, image[1]
        size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self._ids = np.arange(size, dtype=ID)
        self._is_control = np.zeros(size, bool)
        for spelling, name in names.items():
            found = self._tokenizer.token_to_id(name)
            self._ids[found], self._is_control[found] = control[spelling], True
        self._standing = self._tokenizer.token_to_id(IMAGE)
        self._ids[self._standing] = image[1]
        spellings = sorted((token.content for token in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._names, self._added = names, re.compile("|".join(re.escape(text) for text in spellings if text) or "(?!)")

    def script(self, segments: Sequence[Segment], headers: Sequence[str | None], answering: Sequence[bool], lead: str) -> Script:
        """The text of a conversation.

        Args:
            headers: for each turn what the template writes before its text, where that is always the same.
            answering: for each turn whether it is supervised.
            lead: the blank that the template writes between its generation prompt and an answer.
        """
        found, places = Script(), {number: (-1, -1) for number, wanted in enumerate(answering) if wanted}
        pieces, at, written = [], 0, ""
        for segment in segments:
            core = segment.core
            if core is None:
                written = segment.text
                pieces.append(self._added.sub(lambda match: self._names.get(match[0], match[0]), written))
            else:
                pieces.append(segment.text)
                if core.slot >= 0:
                    found.slots.append(core.slot)
                if core.turn in places:
                    start, _ = places[core.turn]
                    if start < 0:
                        start = at - _belonging(written, core.before, headers[core.turn], lead)
                    places[core.turn] = start, at + len(segment.text)
                written = ""
            at += len(pieces[-1])
        found.text, found.answers = "".join(pieces), sorted(places.values())
        if any(start < 0 for start, _ in found.answers):
            raise refused("its chat template leaves nothing of an answer")
        if found.answers != list(places.values()):
            raise refused("its chat template writes answers in another order")
        return found

    def encode(self, scripts: Sequence[Script], *, trim: bool) -> list[Prompt]:
        """Their prompts; with `trim` each ends with its last supervised token."""
        encoded = self._tokenizer.encode_batch([script.text for script in scripts], add_special_tokens=False)
        return [self._prompt(one.ids, one.offsets, script, trim) for one, script in zip(encoded, scripts, strict=True)]

    def _prompt(self, ids: list[int], offsets: list[tuple[int, int]], script: Script, trim: bool) -> Prompt:
        found = np.array(ids, np.int64)
        starts = np.maximum.accumulate(np.array(offsets, np.int64).reshape(-1, 2)[:, 0])
        closing = np.flatnonzero(self._is_control[found])
        spans = []
        for start, end in script.answers:
            first = int(np.searchsorted(starts, start))
            last = np.searchsorted(closing, np.searchsorted(starts, end))
            if last == len(closing):
                raise refused("its chat template ends an answer with no control token")
            spans.append((first, int(closing[last]) + 1))
        if trim and spans:
            found = found[: spans[-1][1]]
        pictures = np.flatnonzero(found == self._standing)
        if len(pictures) != len(script.slots):
            raise refused("a picture is lost in its tokenizer")
        width = np.where(found == self._standing, self._tokens, 1)
        at = np.concatenate([[0], np.cumsum(width)])
        images = [start for _, start in sorted(zip(script.slots, at[pictures].tolist(), strict=True))]
        moved = tuple((int(at[start]), int(at[end])) for start, end in spans)
        return Prompt(np.repeat(self._ids[found], width), moved, tuple(images))


def _belonging(written: str, before: str, header: str | None, lead: str) -> int:
    """How many letters that the template wrote before an answer's first core are the answer's own.

    Those are what the answer itself has there (blanks, a thought's tag), as far as it goes beyond what every answer is given,
    and the blank behind the generation prompt, which a model must generate.
    """
    count = 0
    while count < min(len(before), len(written)) and before[-1 - count] == written[-1 - count]:
        count += 1
    place = written.rfind(header) if header else -1
    if place >= 0:
        count = min(count, len(written) - place - len(header or ""))
    elif not written[len(written) - count :].strip():
        count = 0
    return max(count, len(lead) if written.endswith(lead) else 0)


def _rename(state: dict[str, Any], names: dict[str, str]) -> None:
    """Give tokens other spellings: in the list of added tokens, and in the vocabulary, which some models search themselves."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): number for text, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
