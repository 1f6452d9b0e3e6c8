"""Conversations as token ids, many at a time, end to end in one array: Python looks at turns, never at tokens.

A prompt is a row of segments: pieces of the chat template, texts, runs of placeholders. `lay_out` notes what stands where
before a text is encoded; once the texts' ids are there, the segments are joined, and every position follows from lengths.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np

from pipeline.records import Turn

ID = np.dtype(np.int32)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation as token ids.

    Attributes:
        ids: int32 [T].
        spans: supervised (start, end) pairs, one for each of the assistant's turns, end exclusive.
        image_starts: start of each image's run of P placeholder ids, in the order of the record's images.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    image_starts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """N conversations, each as `Prompt` has it; prompt n has what lies between bounds n and n + 1.

    Attributes:
        ids: int32 [sum of T]; `bounds` int64 [N + 1].
        spans: int32 [answers, 2], counted from the start of their prompt; `span_bounds` int64 [N + 1].
        image_starts: int32 [slots], likewise; `image_bounds` int64 [N + 1].
    """

    ids: np.ndarray
    bounds: np.ndarray
    spans: np.ndarray
    span_bounds: np.ndarray
    image_starts: np.ndarray
    image_bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> Prompt:
        return next(self._some([number]))

    def __iter__(self) -> Iterator[Prompt]:
        return self._some(range(len(self)))

    def _some(self, numbers: Sequence[int]) -> Iterator[Prompt]:
        for number in numbers:
            ids, spans, images = (
                values[bounds[number] : bounds[number + 1]]
                for values, bounds in (
                    (self.ids, self.bounds),
                    (self.spans, self.span_bounds),
                    (self.image_starts, self.image_bounds),
                )
            )
            yield Prompt(ids, tuple((start, end) for start, end in spans.tolist()), tuple(images.tolist()))

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> "Prompts":
        """The same prompts in one piece."""
        spans = [pair for prompt in prompts for pair in prompt.spans]
        images = [start for prompt in prompts for start in prompt.image_starts]
        return cls(
            np.concatenate([np.empty(0, ID), *(prompt.ids for prompt in prompts)]),
            to_bounds(len(prompt.ids) for prompt in prompts),
            np.array(spans, ID).reshape(-1, 2),
            to_bounds(len(prompt.spans) for prompt in prompts),
            np.array(images, ID),
            to_bounds(len(prompt.image_starts) for prompt in prompts),
        )


@dataclass(frozen=True, slots=True)
class Pattern:
    """The chat template for one order of roles, ids as bytes of int32.

    `first` stands before the turns; `rest` has, for each turn, what stands behind it and how many ids of that close an
    answer: 0 where the turn is none. Turns beyond `rest` are left out.
    """

    first: bytes
    rest: tuple[tuple[bytes, int], ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as ids: text n has ids[bounds[n]:bounds[n + 1]]; int32 and int64 [texts + 1]."""

    ids: np.ndarray
    bounds: np.ndarray


@dataclass(slots=True)
class Layout:
    """What stands where in some conversations; places are numbers of segments."""

    texts: list[str] = field(default_factory=list)  # each once: they are encoded in this order
    segments: list[bytes] = field(default_factory=list)  # ids; empty where a text's will stand
    places: list[int] = field(default_factory=list)  # of texts
    which: list[int] = field(default_factory=list)  # of `texts` stands there
    answers: list[int] = field(default_factory=list)  # their first segments
    closings: list[int] = field(default_factory=list)  # the segments behind them
    closing: list[int] = field(default_factory=list)  # how many ids of those belong to the answer
    images: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # which of its record's images each is
    ends: list[tuple[int, int, int]] = field(default_factory=list)  # segments, answers, images up to and with each prompt

    def join(self, encoded: Encoded) -> Prompts:
        """The prompts, from the ids of `texts`."""
        data, edges = encoded.ids.tobytes(), (encoded.bounds * ID.itemsize).tolist()
        contents = [data[start:end] for start, end in pairwise(edges)]
        for place, number in zip(self.places, self.which, strict=True):
            self.segments[place] = contents[number]
        starts = to_bounds(map(len, self.segments)) // ID.itemsize
        ends = np.array([(0, 0, 0), *self.ends], np.int64)
        bounds, span_bounds, image_bounds = starts[ends[:, 0]], ends[:, 1], ends[:, 2]
        spans = np.stack([starts[_places(self.answers)], starts[_places(self.closings)] + _places(self.closing)], axis=1)
        spans -= np.repeat(bounds[:-1], np.diff(span_bounds))[:, None]
        prompt_of = np.repeat(np.arange(len(self.ends)), np.diff(image_bounds))
        shown = np.lexsort((_places(self.slots), prompt_of))  # a record's images in their own order
        images = starts[_places(self.images)][shown] - bounds[prompt_of]
        ids = np.frombuffer(bytearray().join(self.segments), ID)  # writable, as torch wants it
        return Prompts(ids, bounds, spans.astype(ID), span_bounds, images.astype(ID), image_bounds)


def lay_out(conversations: Iterable[tuple[Sequence[Turn], Pattern]], image: bytes) -> Layout:
    """Conversations and their patterns -> where everything stands; `image` are the placeholder ids of one image."""
    found = Layout()
    segments, places, which, images, slots = found.segments, found.places, found.which, found.images, found.slots
    numbers: dict[str, int] = {}  # a question asked of a thousand pictures is encoded once
    for turns, pattern in conversations:
        segments.append(pattern.first)
        for turn, (behind, ends) in zip(turns, pattern.rest, strict=False):
            closing = ends if turn.trained else 0
            if closing:
                found.answers.append(len(segments))
            for part in turn.parts:
                if isinstance(part, str):
                    places.append(len(segments))
                    which.append(numbers.setdefault(part, len(numbers)))
                    segments.append(b"")
                else:
                    images.append(len(segments))
                    slots.append(part.index)
                    segments.append(image)
            if closing:
                found.closings.append(len(segments))
                found.closing.append(closing)
            segments.append(behind)
        found.ends.append((len(segments), len(found.answers), len(images)))
    found.texts = list(numbers)
    return found


def flatten(texts: list[list[int]]) -> Encoded:
    """Each text's ids -> all of them in one array."""
    bounds = to_bounds(map(len, texts))
    return Encoded(np.fromiter(chain.from_iterable(texts), ID, int(bounds[-1])), bounds)


def to_bounds(lengths: Iterable[int]) -> np.ndarray:
    """Lengths -> int64 [N + 1] of where each begins, and the end."""
    return np.cumsum(np.fromiter(chain((0,), lengths), np.int64))


def _places(numbers: list[int]) -> np.ndarray:
    return np.array(numbers, np.int64)
