"""An `Advice` in words."""

from collections.abc import Iterator

import numpy as np

from pipeline.advise.verdict import Advice, Choice
from pipeline.check import Work, seconds_text, size_text
from pipeline.features import Float16Format, Int8Format, row_bytes


def as_lines(advice: Advice) -> list[str]:
    """What was measured, what it costs, and for each stage whether the cache pays."""
    params, shape, rates, picture = advice.params, advice.shape, advice.rates, advice.rates.picture
    steps = ", ".join(f"{_ms(work.step)} a row of {work.name} ({work.train} trains)" for work in advice.work)
    count, encoder = params.runtime.processes, " + ".join(member.model for member in params.vision.members)
    return [
        f"encoder {encoder}, [{shape.tokens}, {shape.width}] {shape.storage}; language model {params.llm.model}; "
        f"on {advice.device}{f', one of {count} processes' if count > 1 else ''}",
        f"measured: a picture {_ms(picture.decoding)} to decode, {_ms(picture.encoding)} to encode; its features "
        f"{_ms(rates.writing)} to write, {_ms(rates.from_memory)} from memory, {_ms(rates.from_disk)} from disk; training {steps}",
        *_disk(advice),
        *(line for work, choice in zip(advice.work, advice.choices, strict=True) for line in _stage(advice, work, choice)),
    ]


def _disk(advice: Advice) -> Iterator[str]:
    fits = "which stay in memory" if advice.disk < advice.memory else f"of which {size_text(advice.memory)} of memory holds a part"
    room = "" if advice.disk < advice.free else f" -> more than the {size_text(advice.free)} that are free"
    yield f"disk: {size_text(advice.disk)} for {advice.pictures:,} pictures, {fits}{room}"
    params, shape, ways = advice.params, advice.shape, list[str]()
    if params.vision.storage == "float16":
        half = Int8Format(shape.tokens, np.zeros(shape.width), np.ones(shape.width))
        ways.append(f"vision.storage=int8 {size_text(advice.pictures * row_bytes(half))}")
    side = round(shape.tokens**0.5)
    if params.vision.pool == 1 and side % 2 == 0:
        ways.append(f"vision.pool=2 {size_text(advice.pictures * row_bytes(Float16Format(shape.tokens // 4, shape.width)))}")
    if params.projector.factor == 1 and side % 2 == 0:
        ways.append("projector.merge=shuffle projector.factor=2 the same disk and a quarter of the image tokens")
    if ways:
        yield f"other ways, each to be tried as `glance advise KEY=VALUE`: {'; '.join(ways)}"


def _stage(advice: Advice, work: Work, choice: Choice) -> Iterator[str]:
    """A line of seconds and a line of what follows."""
    epochs = f"{work.epochs} epoch{'s' * (work.epochs > 1)}"
    yield (
        f"{work.name}, {work.rows:,} rows, {epochs}: {seconds_text(choice.stored)} on stored features, "
        f"{seconds_text(choice.live)} live; extract first: {seconds_text(choice.extract) if choice.extract else 'nothing'}"
    )
    if not work.visits:
        yield "  no row shows a picture: nothing to cache"
    elif work.name != "pretrain" and not work.fresh:
        more = choice.live / choice.stored
        yield f"  its pictures are data.pretrain's, stored by extract: {more:.2f} times as fast{_set(advice, work, more > 1)}"
    else:
        beyond = f" ({work.fresh:,} of its pictures are not in data.pretrain)" if work.name != "pretrain" else ""
        yield f"  {_verdict(work, choice)}{beyond}"


def _verdict(work: Work, choice: Choice) -> str:
    total = choice.extract + choice.stored
    if choice.runs is None:
        return "caching gains nothing here: a run on stored features is no faster than one live"
    again = f"every further run is {choice.live / choice.stored:.2f} times as fast"
    if choice.pays:
        return (
            f"caching pays: {choice.live / total:.2f} times as fast with extraction counted, from {choice.ahead_from} "
            f"epoch{'s' * (choice.ahead_from != 1)} on; {again}"
        )
    held = ", since runtime.live_cache_mb holds all pictures: live encodes each once, too," if work.kept >= work.pictures else ""
    when = f"from {choice.ahead_from} epochs of one run" if choice.ahead_from else f"in no single run{held}"
    return (
        f"a single run takes {total / choice.live:.2f} times as long with the cache, extraction counted: it is ahead {when} "
        f"or from the {_ordinal(choice.runs)} run on; {again}"
    )


def _set(advice: Advice, work: Work, stored: bool) -> str:
    wanted = "stored" if stored else "live"
    return "" if getattr(advice.params, work.name).features == wanted else f" -> {work.name}.features: {wanted}"


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, "th")
    return f"{number:,}{ending}"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
