"""Where contents stand in a rendered conversation: known by marks of private characters around them, never searched for.

A template may trim a text, cut a block of thoughts out of it, write it elsewhere. So a text is marked inside of what templates
look for: blank edges, and words such as `</think>`, stay as they are; only what lies between is enclosed. The rendering without
its marks must be the rendering of the texts as they came; then each mark tells what came from which turn.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.core import BAD_ROWS, PipelineError
from pipeline.records import Turn

OPEN, NUMBERED, CLOSE, IMAGE = "\U0010fff0", "\U0010fff1", "\U0010fff2", "\U0010fff3"
_RESERVED = re.compile("[\U0010fff0-\U0010fff5]")
_MARKED = re.compile(f"{OPEN}([0-9]+){NUMBERED}(.*?){CLOSE}", re.DOTALL)
THOUGHTS = ("<think>", "</think>")


@dataclass(frozen=True, slots=True)
class Core:
    """A piece of a turn: its text, or the number of an image; `before` is what the turn has between the core before and this."""

    turn: int
    text: str
    slot: int = -1
    before: str = ""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation: a core, or what the template wrote."""

    text: str
    core: Core | None = None


class Marker:
    """Encloses what templates do not look into; `words` are what they look for."""

    def __init__(self, words: Sequence[str]) -> None:
        found = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True) if word.strip()) or "(?!)"
        blank = "".join({re.escape(letter) for word in words if not word.strip() for letter in word})
        cut = rf"(?:{found}{f'|[{blank}]' if blank else ''})"
        middle = rf"\s*{cut}(?:\s|{cut})*"
        self._runs = {  # by whether the part is the turn's first and its last: beside a picture is no edge
            (first, last): re.compile("|".join([r"\A\s+"] * first + [middle] + [r"\s+\Z"] * last))
            for first in (False, True)
            for last in (False, True)
        }

    def cores(self, turns: Sequence[Turn]) -> list[Core]:
        """Every core of these turns in order."""
        found: list[Core] = []
        for number, turn in enumerate(turns):
            before = ""
            for place, part in enumerate(turn.parts):
                if not isinstance(part, str):
                    found.append(Core(number, IMAGE, part.index, before))
                    before = ""
                    continue
                if _RESERVED.search(part):
                    raise refused("a text has one of the private characters U+10FFF0 to U+10FFF5, which mark texts here")
                at = 0
                for run in self._runs[place == 0, place == len(turn.parts) - 1].finditer(part):
                    if run.start() > at:
                        found.append(Core(number, part[at : run.start()], before=before))
                        before = ""
                    before += run.group()
                    at = run.end()
                if at < len(part):
                    found.append(Core(number, part[at:], before=before))
                    before = ""
            if turn.role == "assistant" and (before.strip() or not found or found[-1].turn != number):
                found.append(Core(number, "", before=before))  # where an answer of which nothing is left would stand
        return found


def contents(turns: Sequence[Turn], cores: Sequence[Core] | None = None) -> list[dict[str, str]]:
    """The turns as a template takes them, an image as one private character; with its cores, marked."""
    if cores is None:
        return [
            {"role": turn.role, "content": "".join(part if isinstance(part, str) else IMAGE for part in turn.parts)}
            for turn in turns
        ]
    said = contents(turns)
    for number, message in enumerate(said):
        pieces, rest = [], message["content"]
        for place, core in enumerate(cores):
            if core.turn == number:
                pieces.append(f"{core.before}{OPEN}{place}{NUMBERED}{core.text}{CLOSE}")
                rest = rest[len(core.before) + len(core.text) :]
        message["content"] = "".join(pieces) + rest
    return said


def read(marked: str, plain: str, turns: Sequence[Turn], cores: Sequence[Core]) -> list[Segment]:
    """The segments of a rendering; raises `PipelineError` unless they are the rendering of the plain texts, whole and once each.

    A block of thoughts may be left out, as templates do with those of earlier turns, but no turn and no image.
    """
    segments, at, seen = [], 0, set()
    for found in _MARKED.finditer(marked):
        place = int(found[1])
        core = cores[place] if place < len(cores) else None
        if core is None or place in seen or found[2] != core.text:
            raise refused("its chat template changes a text, or writes it twice")
        seen.add(place)
        segments += [Segment(marked[at : found.start()]), Segment(core.text, core)]
        at = found.end()
    segments.append(Segment(marked[at:]))
    if "".join(segment.text for segment in segments) != plain:
        raise refused("its chat template looks into a text in a way that cannot be followed")
    kept = {cores[place].turn for place in seen}
    lost = [core for place, core in enumerate(cores) if place not in seen and (core.slot >= 0 or core.turn not in kept)]
    if lost:
        what = "a picture" if lost[0].slot >= 0 else f"turns ({turns[lost[0].turn].role})"
        raise refused(f"its chat template drops {what}")
    return segments


def refused(what: str) -> PipelineError:
    """The error of one row that a template or tokenizer does not take."""
    return PipelineError(what, code=BAD_ROWS)
