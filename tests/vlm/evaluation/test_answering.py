"""Evaluation against the plainest loop there is: one row at a time, no cache, no padding, no deduplication."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import PATCHES, World, row
from torch.nn import functional as F

from pipeline.features.sources import FeatureSource, NoFeatures, StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.schedule import Schedule
from pipeline.vlm.evaluation import answering
from pipeline.vlm.evaluation.answering import Answering, answer_questions
from pipeline.vlm.evaluation.loss import heldout_loss
from pipeline.vlm.evaluation.questions import find_questions
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.loop import train

WHAT, SHAPE = "<image>\nWhat is this?", "Which is <image> and <image>?"
QUESTIONS = [
    row(WHAT, "It is a red circle.", "0.png"),
    row(WHAT, "A square.", "1.png"),  # the same words, another picture
    row(WHAT, "It is a red circle.", "0.png"),  # both the same
    row(WHAT, "Another answer.", "0.png"),  # both the same, another answer: at most one of them can be right
    row(SHAPE, "Blue.", "2.png", "3.png"),
    row(SHAPE, "Yellow.", "3.png", "2.png"),  # the same pictures the other way round
    row("Is there a square?", "Yes."),
    row("Is there a square?", "No, none."),
    row("<image>", "A yellow triangle.", "5.png"),
    {
        "messages": [*row(WHAT, "A circle.")["messages"], *row("And this? <image>", "A red square.")["messages"]],  # type: ignore[misc]
        "images": ["4.png", "2.png"],
    },
]  # fmt: skip
Setting = tuple[VisionLanguageModel, TokenTable, StoredFeatures]


@pytest.fixture(scope="module")
def learnt(world: World) -> Setting:
    """A model that has learnt some of the questions."""
    table = world.tokens(QUESTIONS, "questions")
    model, source = world.model("all"), StoredFeatures(world.store, table)
    schedule = Schedule(
        epochs=20, batch_size=5, micro_tokens=9999, lr=5e-3, warmup=0.1, min_lr=0.1, weight_decay=0.0, clip_norm=1.0, seed=0
    )  # fmt: skip
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    train(model, Examples(table, source, world.builder.image_id), schedule, accelerator)
    return model.eval(), table, source


def plain_answers(world: World, setting: Setting, source: FeatureSource, limit: int) -> list[str]:
    """Of every supervised turn, behind the row's own turns before it."""
    table = setting[1]
    turns = [(number, start) for number in range(len(table)) for start in table.row(number).spans[:, 0].tolist()]
    return [plain_answer(world, setting, number, start, source, limit) for number, start in turns]


@torch.inference_mode()
def plain_answer(world: World, setting: Setting, number: int, until: int, source: FeatureSource, limit: int) -> str:
    """Greedy, recomputing everything for every token."""
    model, table, _ = setting
    found = table.row(number)
    ids, starts = found.ids[:until].astype(np.int64).tolist(), [start for start in found.image_start.tolist() if start < until]
    features = model.projector(source.features(source.load(np.array(found.slots[: len(starts)], np.int64))).float())
    answer: list[int] = []
    while len(answer) < limit and (not answer or answer[-1] != world.builder.end_id):
        embeddings = model.language_model.get_input_embeddings()(torch.tensor(ids + answer))[None].clone()
        for start, projected in zip(starts, features, strict=True):
            embeddings[0, start : start + PATCHES] = projected
        logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits[0, -1]
        logits[world.builder.image_id] = -torch.inf  # an answer cannot show a picture
        answer.append(int(logits.argmax()))
    return world.builder.decode(answer).strip()


def answers_of(world: World, setting: Setting, *, known: dict[bytes, str] | None = None, **options: Any) -> list[str]:
    model, table, source = setting
    chosen = {"source": source, "blind": False, "batch_size": 4, "max_new_tokens": 12, "tokens": 9999} | options
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    examples = Examples(table, chosen.pop("source"), world.builder.image_id)
    return answer_questions(model, examples, accelerator, world.builder, Answering(**chosen), find_questions(table), known)


REFERENCES = [turn["content"] for question in QUESTIONS for turn in question["messages"] if turn["role"] == "assistant"]  # type: ignore[attr-defined]


def right(answers: list[str]) -> int:
    return sum(answer.strip() == reference for answer, reference in zip(answers, REFERENCES, strict=True))


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 9999), (4, 9999), (256, 9999), (256, 200), (256, 1)])
@pytest.mark.parametrize("limit", [1, 5, 12])
def test_answers_are_those_of_the_plain_loop(world: World, learnt: Setting, batch_size: int, tokens: int, limit: int) -> None:
    expected = plain_answers(world, learnt, learnt[2], limit)
    assert answers_of(world, learnt, batch_size=batch_size, tokens=tokens, max_new_tokens=limit) == expected


def test_a_pass_has_no_more_tokens_than_it_may(learnt: Setting) -> None:
    questions = find_questions(learnt[1])
    ordered = sorted(questions, key=lambda question: -len(question.prompt))
    for tokens in (1, 100, 200, 400):
        parts = answering._batches(ordered, Answering(max_new_tokens=12, batch_size=3, tokens=tokens))
        assert [question for part in parts for question in part] == ordered
        for part in parts:
            assert len(part) <= 3
            assert len(part) == 1 or len(part) * (len(part[0].prompt) + 12) <= tokens


def test_the_test_model_knows_some_answers_by_their_pictures(world: World, learnt: Setting) -> None:
    """Or the other tests here would compare nothing with nothing."""
    answers = answers_of(world, learnt)
    assert 4 <= right(answers) < len(REFERENCES)
    assert answers[0] != answers[1]
    assert answers[4] != answers[5]


def test_blind_answers_do_not_depend_on_the_pictures(world: World, learnt: Setting) -> None:
    zero = NoFeatures(learnt[2])
    expected = plain_answers(world, learnt, zero, 12)
    answers = answers_of(world, learnt, source=zero, blind=True)
    assert answers == expected
    assert answers[0] == answers[1]
    assert answers[4] == answers[5]
    assert answers_of(world, learnt, source=zero, blind=False) == expected, "deduplication changes nothing"


def test_an_answer_never_shows_the_image_token(world: World, learnt: Setting) -> None:
    """A model that likes the image token best wherever it can: the next best word is the answer."""
    eager = (world.model("all"), learnt[1], learnt[2])
    with torch.no_grad():
        eager[0].language_model.get_input_embeddings().weight[world.builder.image_id] *= 50
    expected = plain_answers(world, eager, learnt[2], 6)
    assert answers_of(world, eager, max_new_tokens=6) == expected


def test_equal_prompts_are_generated_once(world: World, learnt: Setting) -> None:
    class Counting(NoFeatures):
        asked = 0

        def load(self, slots: np.ndarray) -> torch.Tensor:
            self.asked += len(slots)
            return super().load(slots)

    for blind, slots in ((False, 1 + 1 + 2 + 2 + 1 + 1 + 2), (True, 1 + 2 + 1 + 2)):
        source = Counting(learnt[2])
        known: dict[bytes, str] = {}
        answers = answers_of(world, learnt, source=source, blind=blind, known=known)
        assert source.asked == slots
        assert answers_of(world, learnt, source=source, blind=blind, known=known) == answers
        assert source.asked == slots, "answers are known from one call to the next"


HABITS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"min_new_tokens": 11},
    {"num_beams": 2},
    {"do_sample": True, "temperature": 5.0},
    {"bad_words_ids": [[5]], "max_length": 3},
]


@pytest.mark.filterwarnings("ignore:Passing")
@pytest.mark.parametrize("habit", HABITS, ids=lambda habit: next(iter(habit)))
def test_a_models_own_habits_of_generation_do_not_count(world: World, learnt: Setting, habit: dict[str, Any]) -> None:
    """Qwen ships `repetition_penalty` and sampling in generation_config.json; the figure is of plain greedy answers."""
    untrained = (world.model("all"), learnt[1], learnt[2])  # its answers repeat themselves, so that a penalty would show
    expected = answers_of(world, untrained)
    untrained[0].language_model.generation_config.update(**habit)
    assert answers_of(world, untrained) == expected


@pytest.mark.parametrize("micro_tokens", [1, 100, 10_000])
@pytest.mark.parametrize("blind", [False, True])
def test_the_held_out_loss_is_the_mean_over_all_supervised_tokens(
    world: World, learnt: Setting, micro_tokens: int, blind: bool
) -> None:
    model, table, stored = learnt
    source = NoFeatures(stored) if blind else stored
    total, count = 0.0, 0
    with torch.inference_mode():
        for number in range(len(table)):
            found = table.row(number)
            ids = torch.from_numpy(found.ids.astype(np.int64))
            places = torch.tensor(found.image_start.tolist(), dtype=torch.long)
            features = source.features(source.load(np.array(found.slots, np.int64)))
            embeddings = model.embed(ids[None], features, torch.zeros_like(places), places)
            logits = model.language_model(inputs_embeds=embeddings).logits[0]
            for start, end in found.spans.tolist():
                total += F.cross_entropy(logits[start - 1 : end - 1], ids[start:end], reduction="sum").item()
                count += end - start
    accelerator = Accelerator(mixed_precision="no", cpu=True)
    loss = heldout_loss(model, Examples(table, source, world.builder.image_id), accelerator, micro_tokens=micro_tokens)
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_evaluation_leaves_the_weights_alone_and_dropout_off(world: World, learnt: Setting) -> None:
    model = learnt[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    answers_of(world, learnt, max_new_tokens=2)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
