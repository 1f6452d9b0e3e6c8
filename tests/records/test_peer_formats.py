"""Rows in the layouts that other projects publish, as their own data sets have them, read without configuration."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import drain
from format_examples import Png, image_folder, seen, talk
from peer_rows import ROWS, TEN

from pipeline.records.formats import BadRow, Columns, SourceSpec
from pipeline.records.record import Record, Turn


@pytest.fixture
def images(tmp_path: Path, png: Png) -> Path:
    return image_folder(tmp_path, png)


PNG = {"a.png": 0, "b.png": 1, "sub/c.png": 2}


def pictures_of(row: dict[str, Any]) -> list[str]:
    shown = row.get("images", row.get("image", []))
    return shown if isinstance(shown, list) else [shown]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "arrow"])
def test_a_published_layout_is_read_as_it_is(tmp_path: Path, images: Path, png: Png, name: str, kind: str) -> None:
    row, turns = ROWS[name]
    path, rows = tmp_path / "rows", [row, row]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        table = pa.Table.from_pylist(rows)
        if kind == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
    found = seen(SourceSpec(str(path), str(images)))
    shown = [png(PNG[picture]) for picture in pictures_of(row) or ["a.png"]]
    slots = sum(not isinstance(part, str) for turn in turns for part in turn.parts)
    assert found == [(turns, shown[:slots])] * 2


@pytest.mark.parametrize(
    "name", ["the_cauldron, nanoVLM", "FineVision", "VQAv2", "ChartQA", "LLaVA-NeXT, LLaVA-OneVision", "TRL, messages"]
)
def test_a_published_parquet_has_its_pictures_within(tmp_path: Path, png: Png, name: str) -> None:
    """As the hub stores them: an image is {bytes, path}, in a list or alone."""
    row, turns = ROWS[name]
    row = dict(row)
    for key in ("image", "images"):
        if key in row:
            within = [{"bytes": png(PNG[picture]), "path": None} for picture in pictures_of(row)]
            row[key] = within if key == "images" else within[0]
    pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / "rows.parquet")
    shown = [png(PNG[picture]) for picture in pictures_of(ROWS[name][0])]
    assert seen(SourceSpec(str(tmp_path / "rows.parquet"))) == [(turns, shown)] * 2


def test_sequences_of_objects_as_datasets_stored_them_are_objects_of_lists(tmp_path: Path, images: Path, png: Png) -> None:
    talks = {"from": ["human", "gpt"], "value": ["<image>What?", "A."]}
    answers = {key: [one[key] for one in TEN] for key in TEN[0]}
    for row, turns in (({"image": "a.png", "conversations": talks}, talk((0, "What?"), "A.")),
                       ({"image": "a.png", "question": "What?", "answers": answers}, talk((0, "\nWhat?"), "net"))):  # fmt: skip
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows")
        assert seen(SourceSpec(str(tmp_path / "rows"), str(images))) == [(turns, [png(0)])]


def test_what_stands_before_a_completion_is_not_trained_on(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}))
    (row,) = drain(SourceSpec(str(tmp_path / "rows.jsonl")))
    assert isinstance(row, Record)
    assert [turn.trained for turn in row.turns] == [True, False, True, True]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a question alone": ({"image": "a", "question": "What?"}, "no answer (answer, multiple_choice_answer, answers, label"),
    "a prompt and a caption that differ": ({"image": "a", "prompt": "What?", "text": "A."}, "has text, prompt: which one counts"),
    "an answer alone": ({"image": "a", "answer": "A."}, "no question (question, query, instruction, prompt)"),
    "a class for an answer": ({"image": "a", "question": "What?", "label": 3}, "content is int"),
    "answers that are no text": ({"image": "a", "question": "What?", "answers": [1, 2]}, "its answers are no texts"),
    "no answers": ({"image": "a", "question": "What?", "answers": []}, "its answers are no texts"),
    "empty answers": ({"image": "a", "question": "What?", "answers": ["", " "]}, "the answer is empty"),
    "two answers": (
        {"image": "a", "question": "What?", "answer": "A.", "response": "B."},
        "has answer, response: which one counts",
    ),
    "the agreed answer and another": (
        {"image": "a", "question": "?", "multiple_choice_answer": "A", "answers": ["A"], "answer": "B"},
        "which one counts",
    ),
    "choices": ({"image": "a", "question": "Which?", "choices": ["x", "y"], "answer": "x"}, "has 'choices', which is not read"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data"),
    "five captions": ({"image": "a", "caption": list("abcde")}, "has 5 captions: which one counts"),
    "a pair without a question": ({"texts": [{"assistant": "A."}]}, "turn 0: content is NoneType"),
    "a pair without an answer": ({"texts": [{"user": "What?"}]}, "turn 0: content is NoneType"),
    "a pair that says more": (
        {"texts": [{"user": "a", "assistant": "b", "thought": "c"}]},
        "turn 0: has 'thought', which is not read",
    ),
    "a tool's answer": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]},
        "role is 'function_call'",
    ),
    "an observation": (
        {"conversations": [{"from": "observation", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "role is 'observation'",
    ),
    "history that is no pairs": ({"query": "a", "response": "b", "history": ["c"]}, "no list of pairs"),
    "an input that is no text": ({"instruction": "a", "input": ["b"], "output": "c"}, "not both text"),
    "lists of turns of unlike lengths": ({"conversations": {"from": ["human"], "value": ["a", "b"]}}, "a list of turns"),
    "a picture that Qwen-VL names elsewhere": (
        {"conversations": [{"from": "user", "value": "<img>http://x/y.jpg</img>?"}, {"from": "assistant", "value": "A."}]},
        "http address",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_row_that_leaves_a_choice_is_refused_in_one_line(tmp_path: Path, kind: str) -> None:
    row, reason = BAD[kind]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (bad,) = drain(SourceSpec(str(tmp_path / "rows.jsonl"), format="jsonl"))
    assert isinstance(bad, BadRow), bad
    assert reason in bad.line()


def test_columns_choose_where_a_row_leaves_a_choice(tmp_path: Path, images: Path) -> None:
    def read(row: dict[str, Any], columns: Columns) -> tuple[Turn, ...]:
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        ((turns, _),) = seen(SourceSpec(str(tmp_path / "rows.jsonl"), str(images), columns=columns))
        return turns

    asked = {"image": "a.png", "question": "What?", "answer": "A.", "response": "B."}
    assert read(asked, Columns(answer="response")) == talk((0, "\nWhat?"), "B.")
    preferred = {"image": "a.png", "question": "What?", "chosen": "A.", "rejected": "B."}
    assert read(preferred, Columns(answer="chosen", ignore=("rejected",))) == talk((0, "\nWhat?"), "A.")
    science = {"image": "a.png", "problem": "What?", "solution": "A.", "hint": "x"}
    assert read(science, Columns(question="problem", answer="solution", ignore=("hint",))) == talk((0, "\nWhat?"), "A.")


def test_every_example_of_the_page_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "your-data.md").read_text(encoding="utf-8")
    examples = re.findall(r"^\| [^|]+ \| `(\{.*?\})` \|", page, re.MULTILINE)
    assert len(examples) >= 14
    (tmp_path / "rows.jsonl").write_text("\n".join(examples))
    assert [row.line() for row in drain(SourceSpec(str(tmp_path / "rows.jsonl"))) if isinstance(row, BadRow)] == []
