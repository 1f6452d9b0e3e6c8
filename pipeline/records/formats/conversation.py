"""A row's content -> a record: the layouts in which conversations and captions come, told apart by their keys.

    messages | conversations: [{"role": "user" | "assistant" | "system", "content": TEXT | PARTS}]    ours, MiniMind-V, OpenAI
    messages | conversations: [{"from": "human" | "gpt" | "system", "value": TEXT}]                   LLaVA
    texts: [{"user": TEXT, "assistant": TEXT}]                                                        nanoVLM, the_cauldron
    question and answer, under the names of `pipeline.records.formats.keys`                           VQAv2, ChartQA, TRL, Alpaca
    text | caption, with one picture                                                                  caption tables

`<image>` in a user's text takes the next of the row's pictures. Where content comes as parts, a picture stands where its
part stands and `<image>` is plain text, as OpenAI writes it. Where a layout has no places for pictures, they stand before the
first question. What would change a conversation unread is refused.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pipeline.core import brief
from pipeline.records.formats.keys import ASKED, CAPTION, LAYOUTS, TURNS, Columns, Look, is_empty, listing, refuse_unread
from pipeline.records.formats.pictures import is_filler, listed
from pipeline.records.formats.row import MEND
from pipeline.records.formats.turns import Build, join_questions, join_texts, make_turn, take, turns_of
from pipeline.records.record import PLACEHOLDER, Turn, bad_row, check_order, is_half_surrogate, load_json

USUAL = Columns()


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows become records: columns, what a caption answers, and what a picture without `<image>` means."""

    columns: Columns = USUAL
    prompt: str = PLACEHOLDER
    unplaced: str = "refuse"  # or "first": pictures without a place stand before the first question


def _parts_names(messages: Any) -> bool:
    """Whether commas part the names in `image`: they do beside MiniMind's turns, and belong to the name beside LLaVA's (`from`)."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return messages is not None and not (isinstance(first, dict) and "from" in first)


def turns_and_pictures(content: dict[str, Any], reading: Reading, *, where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """A row's turns and its pictures in slot order, each as the row has it; raises `PipelineError` naming what is wrong."""
    look = reading.columns.look(tuple(content))
    messages, pictures = _pick(content, look, "turns", where), _pick(content, look, "images", where)
    work = Build(where, reading.columns, listed(pictures, where, part_at_commas=_parts_names(messages)), [])
    if look.closely or look.pointers:
        refuse_unread(content, look, where, shows=lambda: bool(work.given))
    layout, turns = TURNS, _conversation(messages, work) if messages is not None else []
    if not turns:
        layout, turns = ASKED, _question_and_answer(content, look, work)
    if not turns:
        layout, turns = CAPTION, _caption(content, look, reading, work)
    if "system" in look.present:
        turns = _with_system(turns, _pick(content, look, "system", where), work)
    if look.mixed:
        _refuse_second_layout(content, look, layout, turns, where)
    if work.given and not work.shown and not work.has_parts:
        turns = _place(turns, work, reading)
    if work.taken != len(work.given):
        remedy = MEND if work.taken else f"{MEND}, or set data.*.unplaced: first"
        raise bad_row(f"{work.taken} {PLACEHOLDER} placeholders for {len(work.given)} images", where, remedy)
    check_order([turn.role for turn in turns], where)
    if not any(turn.trained and turn.role == "assistant" for turn in turns):
        raise bad_row("none of its answers is to be trained on: nothing to learn", where)
    return tuple(turns), work.shown


def _pick(content: dict[str, Any], look: Look, kind: str, where: str) -> Any:
    """The value under the column that the user named, or under the one usual key that is there; None without any."""
    keys = look.present.get(kind, ())
    if len(keys) < 2:
        return content[keys[0]] if keys else None
    full = [key for key in keys if not is_empty(content[key])]
    if len(full) > 1:
        raise bad_row(f"has {listing(full)}: which one counts?", where, f"set columns.{kind}")
    return content[full[0]] if full else next((content[key] for key in keys if content[key] is not None), None)


def _caption(content: dict[str, Any], look: Look, reading: Reading, work: Build) -> list[Turn]:
    caption = _pick(content, look, "text", work.where)
    if caption is None:
        kinds = (reading.columns.usual(kind)[:2] for kind in ("turns", "question", "text"))
        raise bad_row("no " + ", and no ".join(" or ".join(keys) for keys in kinds), work.where, _COLUMNS)
    if not work.given:
        raise bad_row("a caption without an image", work.where, "mend or remove the row, or set columns.images")
    if isinstance(caption, list) and caption and all(isinstance(text, str) for text in caption):
        if len(caption) > 1:
            raise bad_row(f"has {len(caption)} captions: which one counts?", work.where, "make a row of each")
        caption = caption[0]
    return [make_turn("user", reading.prompt, 0, work), make_turn("assistant", caption, 1, work)]


_COLUMNS = f"{MEND}, or name its columns in data.*.columns"


def _question_and_answer(content: dict[str, Any], look: Look, work: Build) -> list[Turn]:
    """Turns of a row with a question and an answer, either of them text or turns themselves (TRL); none where it has neither."""
    if look.present.keys().isdisjoint(ASKED):
        return []
    question, answer = _question(content, look, work.where), _answer(content, look, work.where)
    if is_empty(question) or answer is None:
        if (is_empty(question) and answer is None) or not is_empty(_pick(content, look, "text", work.where)):
            return []
        missing = "question" if is_empty(question) else "answer"
        remedy = f"{MEND}, or set columns.{missing}"
        raise bad_row(f"no {missing} ({', '.join(work.columns.usual(missing))})", work.where, remedy)
    work.places = True
    turns = _history(_pick(content, look, "history", work.where), work)
    if isinstance(question, list):
        asked = _conversation(question, work)
        turns += [turn._replace(trained=turn.role != "assistant") for turn in asked]  # TRL trains the completion alone
    else:
        turns.append(make_turn("user", question, len(turns), work))
    said = _rows_of(answer)
    if isinstance(said, list) and said and isinstance(said[0], dict) and "answer" not in said[0]:
        return turns + _conversation(said, work)
    return [*turns, make_turn("assistant", _one_answer(said, work.where), len(turns), work)]


def _question(content: dict[str, Any], look: Look, where: str) -> Any:
    """The question; of an instruction with an input (Alpaca) both, a line end between them."""
    question, more = _pick(content, look, "question", where), _pick(content, look, "input", where)
    if is_empty(question) or is_empty(more):
        return more if is_empty(question) else question
    if not isinstance(question, str) or not isinstance(more, str):
        raise bad_row("its question and its input are not both text", where)
    return f"{question}\n{more}"


def _answer(content: dict[str, Any], look: Look, where: str) -> Any:
    """The answer. VQAv2 has those of ten people and, beside them, the one they agree on."""
    agreed, keys = "multiple_choice_answer", look.present.get("answer", ())
    if agreed in keys and not is_empty(content[agreed]):
        look = look._replace(present={"answer": tuple(key for key in keys if key != "answers")})
    return _pick(content, look, "answer", where)


def _one_answer(said: Any, where: str) -> Any:
    """Of several answers to one question the one that stands most often, of equals the first."""
    if not isinstance(said, list):
        return said
    texts = [one.get("answer") if isinstance(one, dict) else one for one in said]
    given = [text for text in texts if isinstance(text, str)]
    if not given or len(given) < len(texts):
        raise bad_row("its answers are no texts", where, f"{MEND}, or set columns.answer")
    return Counter([text for text in given if text.strip()] or [""]).most_common(1)[0][0]


def _history(history: Any, work: Build) -> list[Turn]:
    """Earlier questions and answers in pairs, as LLaMA-Factory and ms-swift have them."""
    if is_empty(history):
        return []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise bad_row("its history is no list of pairs of a question and an answer", work.where)
    texts = [text for pair in history for text in pair]
    return [make_turn(("user", "assistant")[number % 2], text, number, work) for number, text in enumerate(texts)]


def _rows_of(value: Any) -> Any:
    """An object of lists, as `datasets` stores a sequence of objects, as a list of objects; anything else as it is."""
    if not isinstance(value, dict) or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]


def _conversation(messages: Any, work: Build) -> list[Turn]:
    if isinstance(messages, str):
        if is_half_surrogate(messages):
            raise bad_row("the conversation is not UTF-8 or has half a surrogate pair", work.where)
        try:
            messages = load_json(messages)
        except (ValueError, RecursionError) as error:
            raise bad_row(f"the conversation is not JSON: {brief(error)}", work.where) from None
    if isinstance(messages, dict):
        messages = _rows_of(messages)
    if not isinstance(messages, list) or not messages:
        raise bad_row("expected a list of turns with at least one", work.where)
    turns: list[Turn] = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise bad_row(f"turn {position}: expected an object, got {type(message).__name__}", work.where)
        turns += turns_of(message, position, work)
    return join_questions(turns) if work.has_parts else turns


def _with_system(turns: list[Turn], system: Any, work: Build) -> list[Turn]:
    """The row's system prompt as its system turn; raises where the conversation has another."""
    if is_empty(system):
        return turns
    if not isinstance(system, str):
        raise bad_row(f"its system prompt is {type(system).__name__}, expected text", work.where)
    turn = make_turn("system", system, 0, work)
    if turns[0].role != "system":
        return [turn, *turns]
    if turns[0].parts != turn.parts:
        raise bad_row(
            "has a system prompt and another system turn: which one counts?", work.where, f"{MEND}, or set columns.system"
        )
    return turns


def _refuse_second_layout(content: dict[str, Any], look: Look, layout: frozenset[str], turns: list[Turn], where: str) -> None:
    """A row in two layouts: what is not read must stand in the turns, word for word, or it would be lost unnoticed."""
    said = {part.strip() for turn in turns for part in turn.parts if isinstance(part, str)}
    for kind, keys in look.present.items():
        if kind in layout or not any(kind in other for other in LAYOUTS):
            continue
        for key in keys:
            value = content[key]
            if not is_empty(value) and not (isinstance(value, str) and value.strip() in said):
                used = [name for part in sorted(layout) for name in look.present.get(part, ())]
                remedy = f"name what says nothing in columns.ignore, or set columns.{kind}"
                raise bad_row(f"has {listing([*used, key])}: which one counts?", where, remedy)


def _place(turns: list[Turn], work: Build, reading: Reading) -> list[Turn]:
    """A row with pictures and no place for them."""
    if len(work.given) == 1 and is_filler(work.given[0]):  # MiniMind-V 2026: its rows without a picture carry a black one
        work.given = []
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or not (work.places or reading.unplaced == "first"):
        return turns
    slots = [take(work) for _ in work.given]
    turns[first] = Turn("user", join_texts([*slots, "\n", *turns[first].parts]))
    return turns
