"""What a chat template writes around the contents: taken apart once per order of roles, asked again where it looks into a text."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pipeline.core import ARTEFACT, BAD_ROWS, PipelineError
from pipeline.records import ImageSlot, Turn
from pipeline.text.marking import Core, Marker, Segment, contents, read
from pipeline.text.template import OTHERS, Template

# answers are short, so a think block stays empty; some templates (MiniMind2) then write one in the prompt alone
THINKING: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {}, {"thinking": False})

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_QUESTION, _ANSWER = "What is this?", "A cat."
_ORDERS = (("system", "user", "assistant", "user"), ("user", "assistant", "user"))  # then the answer is to come
# texts that a template might treat in a way of its own; where it changes one, all texts are rendered by it
PROBES = (
    'It is <b>bold</b> & "quoted", isn\'t it? C:\\new\\table 50%',
    "{{ messages }} {% raw %} {# 1 #} ${x} %s {0}",
    '{"name": "f", "parameters": {"a": [1, null]}}',
    "Größe   und\tWeite\n\n\n  - 猫はどこ?\r\n`код`  🐈 1,234.5",
    "SHOUTED None True 0 " + "a long text " * 400 + "ends.",
)


class Scaffold:
    """A template with the options under which training and generation see the same prompt.

    Attributes:
        options: variables that the template is given.
        lead: blank letters that it writes between its generation prompt and an answer.
        written: all that it writes around plain texts, to find tokens in.

    Raises `PipelineError` where there are no such options.
    """

    def __init__(self, template: Template, where: str) -> None:
        self.template, self._where = template, where
        self.options, self.lead = self._choose_options()
        self.pieces = lru_cache(maxsize=4096)(self._find_pieces)
        self.written = "".join(map(self._written, _ORDERS))
        if _ADDRESS.search(self.written):
            raise PipelineError("its chat template writes an address in memory, which is another in every process", where=where)
        self._marker, self._whole = Marker(()), template.whole | {""}
        self._opaque = not all(self._is_transparent(roles) for roles in (_ORDERS[0][:3], _ORDERS[1][:2]))

    def avoid(self, spellings: Sequence[str]) -> None:
        """Never let a text's own spelling of these stand outside of its marks."""
        self._marker = Marker([word for word in self.template.words if not any(spelling in word for spelling in spellings)])

    def _choose_options(self) -> tuple[dict[str, Any], str]:
        """The first options under which an answer in training stands where the generation prompt ends, blanks aside."""
        asked = [{"role": "user", "content": _QUESTION}]
        talks = [(asked, True), ([*asked, {"role": "assistant", "content": _ANSWER}], False)]
        first = ""
        for options in THINKING:
            prompt, whole = self.template.render(talks, options)
            lead, found, _ = whole.removeprefix(prompt).partition(_ANSWER)
            if whole.startswith(prompt) and found and not lead.strip():
                return options, lead
            first = first or prompt
        raise PipelineError(
            f"its chat template asks for an answer by {first[-24:]!r}, which no answer in training follows",
            where=self._where,
            remedy=OTHERS,
            code=ARTEFACT,
        )

    def _written(self, roles: tuple[str, ...]) -> str:
        try:
            messages = [{"role": role, "content": _QUESTION} for role in roles]
            return "".join(self.template.render([(messages, True), (messages[:-1], False)], self.options))
        except PipelineError as error:
            if error.code != BAD_ROWS:
                raise
            return ""  # a template without this role

    def _find_pieces(self, roles: tuple[str, ...], generate: bool) -> tuple[str, ...] | None:
        """What stands before, between and after the contents: len(roles) + 1 pieces; None where they are not in order."""
        marks = [f"[slot{i:05d}]" for i in range(len(roles))]
        talk = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        (text,) = self.template.render([(talk, generate)], self.options)
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                return None
            pieces.append(before)
        return (*pieces, text)

    def _is_transparent(self, roles: tuple[str, ...]) -> bool:
        """Whether texts of all kinds come out as they go in, with the same around them."""
        try:
            talks = [
                [Turn(role, (PROBES[(start + place) % len(PROBES)],)) for place, role in enumerate(roles)]
                for start in range(len(PROBES))
            ]
            whole = self.template.render([(contents(turns), False) for turns in talks], self.options)
            pieces = self.pieces(roles, False)
        except PipelineError as error:
            if error.code != BAD_ROWS:
                raise
            return True  # a template without these roles: a row that has them says so
        return pieces is None or all(
            text == "".join(segment.text for segment in _put_together(turns, pieces))
            for text, turns in zip(whole, talks, strict=True)
        )

    def odd(self, conversations: Sequence[Sequence[Turn]]) -> set[int]:
        """Numbers of those to render: a text is empty, has a blank edge or a word that the template looks for."""
        if self._opaque:
            return set(range(len(conversations)))
        whole = self._whole
        found = set()
        for number, turns in enumerate(conversations):
            for _, parts, _ in turns:
                if len(parts) == 1:
                    (text,) = parts
                    if text in whole or (text.__class__ is str and text.strip() != text):  # type: ignore[union-attr]
                        found.add(number)
                elif not parts or _has_blank_edge(parts):
                    found.add(number)
        return found | self._with_words(conversations)

    def _with_words(self, conversations: Sequence[Sequence[Turn]]) -> set[int]:
        if not self.template.words:
            return set()
        texts = ["\0".join([part for turn in turns for part in turn.parts if isinstance(part, str)]) for turns in conversations]
        together = "\0".join(texts)
        words = [word for word in self.template.words if word in together]
        return {number for number, text in enumerate(texts) if any(word in text for word in words)} if words else set()

    def segments(self, conversations: Sequence[Sequence[Turn]], odd: Sequence[bool], generate: bool) -> list[list[Segment]]:
        """What the template writes and what is content; raises `PipelineError` where that cannot be told."""
        pieces = [
            None if is_odd else self.pieces(_roles(turns), generate) for turns, is_odd in zip(conversations, odd, strict=True)
        ]
        asked = [turns for turns, known in zip(conversations, pieces, strict=True) if known is None]
        cores = [self._marker.cores(turns) for turns in asked]
        talks = [(contents(turns, marked), generate) for turns, found in zip(asked, cores, strict=True) for marked in (found, None)]
        texts = self.template.render(talks, self.options)
        rendered = iter(
            [
                read(texts[2 * number], texts[2 * number + 1], turns, found)
                for number, (turns, found) in enumerate(zip(asked, cores, strict=True))
            ]
        )
        return [
            next(rendered) if known is None else _put_together(turns, known)
            for turns, known in zip(conversations, pieces, strict=True)
        ]

    def headers(self, turns: Sequence[Turn], generate: bool) -> Sequence[str | None]:
        """What the template writes before each of these turns, whatever their texts."""
        return self.pieces(_roles(turns), generate) or [None] * len(turns)


def _has_blank_edge(parts: Sequence[str | ImageSlot]) -> bool:
    first, last = parts[0], parts[-1]
    return (isinstance(first, str) and first.lstrip() != first) or (isinstance(last, str) and last.rstrip() != last)


def _roles(turns: Sequence[Turn]) -> tuple[str, ...]:
    return tuple([turn.role for turn in turns])


def _put_together(turns: Sequence[Turn], pieces: Sequence[str]) -> list[Segment]:
    found = [Segment(pieces[0])]
    for number, (turn, behind) in enumerate(zip(turns, pieces[1:], strict=True)):
        for core in Marker(()).cores([turn]):
            found.append(Segment(core.text, Core(number, core.text, core.slot)))
        found.append(Segment(behind))
    return found
