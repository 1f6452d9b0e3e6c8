"""An answer that is not to be trained on is read by the model and not supervised: the same ids, other spans."""

from typing import Any

import pytest
from conftest import World
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.records import ImageSlot, Turn
from pipeline.text.builder import PromptBuilder

texts = st.sampled_from(["Yes.", " A cat.", "No, none. ", "<think>\nHm.\n</think>\n\nBlue.", "Two\n\nlines"])
answers = st.lists(st.tuples(texts, st.booleans(), st.booleans()), min_size=1, max_size=4)


@pytest.mark.parametrize("dialect", ["embedded", "smollm2", "qwen3"])
@settings(max_examples=40, deadline=None)
@given(talk=answers, odd=st.booleans())
def test_the_ids_are_those_of_the_whole_talk_and_the_spans_those_of_trained_answers(
    builders: dict[str, PromptBuilder], dialect: str, talk: list[tuple[str, bool, bool]], odd: bool
) -> None:
    turns: list[Turn] = []
    for text, trained, shows in talk:
        parts: list[Any] = [ImageSlot(sum(isinstance(p, ImageSlot) for turn in turns for p in turn.parts))] if shows else []
        turns += [Turn("user", (*parts, "What is it? " if odd else "What is it?")), Turn("assistant", (text,), trained)]
    builder = builders[dialect]
    masked, whole = builder.build(turns), builder.build([turn._replace(trained=True) for turn in turns])
    assert masked.ids.tolist() == whole.ids.tolist()
    assert masked.image_starts == whole.image_starts
    assert masked.spans == tuple(span for span, (_, trained, _) in zip(whole.spans, talk, strict=True) if trained)


def test_a_last_answer_that_is_masked_takes_no_picture_with_it(world: World) -> None:
    for asked in ("Is it? ", "Is it?"):  # encoded with its template, and apart from it
        turns = [Turn("user", (ImageSlot(0), asked)), Turn("assistant", ("Yes.",)),
                 Turn("user", (ImageSlot(1), asked)), Turn("assistant", ("No.",), trained=False)]  # fmt: skip
        prompt = world.builder.build(turns)
        assert len(prompt.image_starts) == 2
        assert len(prompt.spans) == 1
