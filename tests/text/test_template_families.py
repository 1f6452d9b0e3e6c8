"""Each family's chat template with each kind of tokenizer: the ids of `apply_chat_template`, or refused at once."""

import random
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from template_examples import FAMILIES, IMAGE, KINDS, make_tokenizer
from transformers.utils import chat_template_utils

from pipeline.core.errors import BAD_ROWS, PipelineError
from pipeline.records.record import ImageSlot, Turn
from pipeline.text.builder import PromptBuilder
from pipeline.text.template import DATE

PATCHES = 3
REFUSED = {  # and why, as the error says it
    "DeepSeek R1 (distilled)": "no answer in training follows",
    "OLMo 3 Think": "no answer in training follows",
    "gpt-oss": "no answer in training follows",
    "Falcon": "ends an answer with no control token",
    "GLM-4": "ends an answer with no control token",
    "SOLAR": "ends an answer with no control token",
}
WORDS = (
    "What", "is", "this?", "a red", "circle.", "It's", "50%", "user", "assistant", "system", "A", "猫は", "Größe", "🐈", "C:\\x",
    "{a}", "\t", "1,234", "[INST]", "USER:", "e\u0301", "Yes.", "<b>", "</b>", '"q"', "\u00a0", "x" * 40,
)  # fmt: skip
EDGES = ("", "", "", "", " ", "\n", "  ", "\n\n", " \n ", "\t")
THOUGHTS = ("<think>\nLet me see.\n</think>\n\n", "<think>\n\n</think>\n\n", "<think>Hm.</think>", "a </think> b ", "<think> open ")


class _Clock(datetime):
    @classmethod
    def now(cls) -> datetime:  # type: ignore[override]
        return datetime.fromisoformat(DATE)


@pytest.fixture(autouse=True)
def _on_that_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)


def make_text(rng: random.Random, role: str, words: Sequence[str]) -> str:
    if role != "assistant" and rng.random() < 0.05:
        return ""
    said = rng.choices(words, k=rng.randint(1, 8))
    text = "".join(word + rng.choice((" ", " ", " ", "\n", "", "  ", "\n\n")) for word in said).strip() or "x"
    if role == "assistant" and rng.random() < 0.2:
        text = rng.choice(THOUGHTS) + text
    return rng.choice(EDGES) + text + rng.choice(EDGES)


def make_talk(rng: random.Random, words: Sequence[str]) -> list[Turn]:
    turns = [Turn("system", (make_text(rng, "system", words),))] if rng.random() < 0.3 else []
    images = 0
    for _ in range(rng.randint(1, 4)):
        parts: tuple[str | ImageSlot, ...] = (make_text(rng, "user", words),)
        if rng.random() < 0.4:
            parts = (ImageSlot(images), "\nWhat is this?")
            images += 1
        elif rng.random() < 0.2:
            parts = ("See ", ImageSlot(images), ImageSlot(images + 1), " and say.")
            images += 2
        turns += [Turn("user", parts), Turn("assistant", (make_text(rng, "assistant", words),))]
    return turns


def messages_of(turns: list[Turn]) -> list[dict[str, str]]:
    return [
        {"role": turn.role, "content": "".join(part if isinstance(part, str) else IMAGE * PATCHES for part in turn.parts)}
        for turn in turns
    ]


def letters(text: str) -> str:
    """Without blanks: SentencePiece puts one behind some added tokens, and has them as a letter of its own."""
    return "".join(text.replace("▁", " ").split())


def check_spans(builder: PromptBuilder, turns: list[Turn]) -> None:
    """What is supervised is each answer, as the template leaves it, and its end of turn."""
    prompt = builder.build(turns)
    answers = [str(turn.parts[0]) for turn in turns if turn.role == "assistant"]
    assert len(prompt.spans) == len(answers)
    for (start, end), answer in zip(prompt.spans, answers, strict=True):
        assert prompt.ids[end - 1] == builder.end_id or prompt.ids[end - 1] in builder.control.values()
        said = letters(builder.tokenizer.decode(prompt.ids[start : end - 1], skip_special_tokens=False))
        last = letters(answer.split("</think>")[-1])
        assert said.endswith(last), (said, answer)
        assert said.removesuffix(last) in letters(answer), (said, answer)
    assert prompt.spans[-1][1] == len(prompt.ids)


def compare(builder: PromptBuilder, turns: list[Turn]) -> str:
    """ "" where the ids are the template's own, else why the row is refused."""
    tokenizer, messages = builder.tokenizer, messages_of(turns)
    try:
        expected = tokenizer.apply_chat_template(messages, **builder.options)["input_ids"]
    except Exception:
        expected = None
    try:
        built = builder.build(turns, trim=False)
    except PipelineError as error:
        if error.code != BAD_ROWS:
            raise
        return "the template refuses it" if expected is None else error.what
    assert built.ids.tolist() == expected
    images = [part for turn in turns for part in turn.parts if isinstance(part, ImageSlot)]
    assert all(set(built.ids[at : at + PATCHES].tolist()) == {builder.image_id} for at in built.image_starts)
    assert len(built.image_starts) == len(images)
    check_spans(builder, turns)
    question = builder.build_question(turns[:-1]).ids.tolist()
    assert question == tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **builder.options)["input_ids"]
    return ""


def try_family(folder: Path, name: str, kind: str, count: int) -> Counter[str]:
    make_tokenizer(FAMILIES[name], kind).save_pretrained(folder)
    rng, family = random.Random(f"{name} {kind}"), FAMILIES[name]
    builder = PromptBuilder(str(folder), image_token=IMAGE, tokens=PATCHES)
    builder.check()
    words = [word for word in WORDS if word not in family.special]
    found = Counter(compare(builder, make_talk(rng, words)) for _ in range(count))
    for _ in range(count // 4 + 1):  # what a text spells of a control token stays text
        turns = make_talk(rng, [*words, *family.special])
        plain = [Turn(turn.role, tuple(without(part, family.special) for part in turn.parts)) for turn in turns]
        try:
            hostile, harmless = builder.build(turns), builder.build(plain)
        except PipelineError as error:
            found[error.what] += 1
            continue
        steering = [[token for token in one.ids.tolist() if token in builder.control.values()] for one in (hostile, harmless)]
        assert steering[0] == steering[1]
        check_spans(builder, turns)
    return found


def without(part: str | ImageSlot, spellings: tuple[str, ...]) -> str | ImageSlot:
    if isinstance(part, str):
        for spelling in spellings:
            part = part.replace(spelling, "x")
    return part


# what a row can be refused for: roles that the template has no place for, and what follows from that
ROLES = ("the template refuses it", "its chat template refuses turns", "its chat template drops turns (system)")
works = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])


PAGE = Path(__file__).parents[2] / "docs" / "templates.md"


def rows_of_page() -> dict[str, list[str]]:
    """The table of docs/templates.md: family -> byte-level, SentencePiece, system turn, date."""
    lines = [line.strip("|\n").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines[2:]}


def facts(builder: PromptBuilder) -> list[str]:
    """What the page says of a family with a kind of tokenizer: how it is encoded, what becomes of a system turn, the date."""
    talk = [Turn("system", ("Be brief.",)), Turn("user", ("What?",)), Turn("assistant", ("A cat.",))]
    try:
        system = "yes" if builder.build(talk).spans else ""
    except PipelineError as error:
        system = "refuses it" if "refuses" in error.what else "drops it: refused"
    apart = builder._pattern(("user", "assistant"), trim=True, generate=False)
    return ["apart" if apart else "whole", system, builder.date if builder.dated else ""]


def expect_equal(found: Counter[str]) -> None:
    """Most rows are used, and their ids were compared; the others have a role that the template does not know."""
    assert all(reason.startswith(ROLES) for reason in found if reason), found
    assert found[""] >= 0.3 * found.total(), found


@pytest.mark.parametrize("kind", KINDS[:2])
@works
def test_ids_are_the_templates_own(tmp_path: Path, name: str, kind: str) -> None:
    expect_equal(try_family(tmp_path, name, kind, 10))
    told = rows_of_page()[name]
    assert facts(PromptBuilder(str(tmp_path), image_token=IMAGE, tokens=PATCHES)) == [told[KINDS.index(kind)], *told[2:]]


def test_the_page_names_every_family_and_why_some_do_not_work() -> None:
    told = rows_of_page()
    assert list(told) == list(FAMILIES)
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"on {len(FAMILIES) - len(REFUSED)} families of chat templates" in readme
    for name, cells in told.items():
        assert ("no: " in cells[0]) == (name in REFUSED)
        assert all(cell.removeprefix("no: ") == REFUSED[name] for cell in cells[:2] if name in REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@works
def test_ids_are_the_templates_own_in_two_hundred_conversations(tmp_path: Path, name: str, kind: str) -> None:
    expect_equal(try_family(tmp_path, name, kind, 200))


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained_as_it_is_asked_is_refused_at_once(tmp_path: Path, name: str, kind: str) -> None:
    make_tokenizer(FAMILIES[name], kind).save_pretrained(tmp_path)
    with pytest.raises(PipelineError, match=REFUSED[name]) as caught:
        PromptBuilder(str(tmp_path), image_token=IMAGE, tokens=PATCHES)
    assert len(caught.value.line().splitlines()) == 1
