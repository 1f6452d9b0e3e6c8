"""Multiple choice by likelihood: which questions offer options, and that the likeliest is the one of a plain computation."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import World, row
from torch.nn import functional as F

from pipeline.features.sources import LiveFeatures, NoFeatures, StoredFeatures
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.sharing import find_sharing
from pipeline.vlm.evaluation.choices import choose, find_options
from pipeline.vlm.evaluation.questions import Question, Wording, find_questions

ASKED = "Which is it?\nA. a red circle\nB. a blue square\nC. none"
OFFERED = [
    (ASKED, "B", (["A", "B", "C"], 1)), (ASKED, " C. ", (["A.", "B.", "C."], 2)), (ASKED, "(A)", (["(A)", "(B)", "(C)"], 0)),
    (ASKED, "B. a blue square", (["A. a red circle", "B. a blue square", "C. none"], 1)),
    (ASKED, "a blue square", (["a red circle", "a blue square", "none"], 1)),
    ("A. red\nB. blue\nAnswer: A\nA: one\nB: two", "A", (["A", "B"], 0)),
    (ASKED, "D", None), (ASKED, "something else", None), (ASKED, "B. a red circle", None), (ASKED, "", None),
    ("What is this?", "A", None), ("A. only one", "A", None), ("B. one\nA. two", "A", None), ("A circle.\nA square.", "A", None),
]  # fmt: skip


@pytest.mark.parametrize(("question", "reference", "offered"), OFFERED)
def test_options_are_the_lettered_lines_of_a_question(question: str, reference: str, offered: tuple[list[str], int] | None) -> None:
    assert find_options(question, reference) == offered


ROWS = [
    row(f"<image>\n{ASKED}", "B", "0.png"),
    row(f"<image>\n{ASKED}", "a red circle", "1.png"),
    row("<image>\nWhat is this?", "A square.", "2.png"),
    row("What?\nA. one\nB. two\nC. three\nD. four", "C. three"),
    row("<image> <image> Is it one of these?\nA. yes\nB. no", "A", "3.png", "0.png"),
]  # fmt: skip


@torch.inference_mode()
def plain(model: torch.nn.Module, question: Question, ids: np.ndarray, source: object) -> float:
    """The log-likelihood of an answer's ids."""
    whole = torch.from_numpy(np.concatenate([question.prompt, ids]).astype(np.int64))
    features = source.features(source.load(np.array(question.slots, np.int64)))  # type: ignore[attr-defined]
    places = torch.tensor(question.image_start.tolist(), dtype=torch.long)
    embedded = model.embed(whole[None], features, torch.zeros_like(places), places)  # type: ignore[operator]
    scores = F.log_softmax(model.language_model(inputs_embeds=embedded).logits[0], -1)  # type: ignore[operator, union-attr]
    return sum(scores[len(question.prompt) + at - 1, token].item() for at, token in enumerate(ids.tolist()))


@pytest.mark.parametrize("kind", ["stored", "live", "blind", "shared"])
def test_the_likeliest_option_is_that_of_a_plain_computation(world: World, kind: str) -> None:
    table, model = world.tokens(ROWS, "choices"), world.model().eval()
    stored = StoredFeatures(world.store, table)
    source = {"live": LiveFeatures(world.clip, world.images, table), "blind": NoFeatures(stored)}.get(kind, stored)
    examples = Examples(table, source, world.builder.image_id)
    if kind == "shared":
        examples = replace(examples, shared=find_sharing(table))
    questions, wording = find_questions(table), Wording(world.builder)
    offered = [find_options(wording(question), world.builder.decode(question.reference)) for question in questions]
    assert [found is not None for found in offered] == [True, True, False, True, True]
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    chosen = choose(model, examples, accelerator, world.builder, questions, offered, micro_tokens=300)
    for question, found, value in zip(questions, offered, chosen.tolist(), strict=True):
        if found is None:
            assert np.isnan(value)
            continue
        sums = []
        for text in found[0]:
            built = world.builder.encode([text]).ids
            sums.append(plain(model, question, np.concatenate([built, question.reference[-1:]]), source))
        assert value == float(np.argmax(sums) == found[1])


def test_a_set_without_options_costs_nothing(world: World) -> None:
    questions = find_questions(world.table)
    examples = Examples(world.table, NoFeatures(StoredFeatures(world.store, world.table)), world.builder.image_id)
    found = choose(None, examples, None, world.builder, questions, [None] * len(questions), micro_tokens=1)  # type: ignore[arg-type]
    assert np.isnan(found).all()
