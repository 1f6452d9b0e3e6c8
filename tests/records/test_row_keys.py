"""What a row says is read, known to teach nothing, or refused by name: in rows, turns and parts, whatever file they come in."""

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import ANSWER, ASKED, GOOD, drain, said, tarred
from format_examples import Png, talk

from pipeline.core.errors import PipelineError
from pipeline.params.schema import Columns as ColumnsSection
from pipeline.records.formats import BadRow, Columns, SourceSpec, open_source
from pipeline.records.record import Record, Turn

TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
TEXT: dict[str, Any] = {"messages": TALK}


def read(tmp_path: Path, content: dict[str, Any], columns: Columns = Columns()) -> Record | BadRow:  # noqa: B008
    (tmp_path / "rows.jsonl").write_text(json.dumps(content) + "\n")
    (row,) = drain(SourceSpec(str(tmp_path / "rows.jsonl"), columns=columns))
    return row


def refused(tmp_path: Path, content: dict[str, Any], columns: Columns = Columns()) -> str:  # noqa: B008
    row = read(tmp_path, content, columns)
    assert isinstance(row, BadRow), row
    assert row.line().startswith(f"{tmp_path}/rows.jsonl:1: ")
    return row.line()


def used(tmp_path: Path, content: dict[str, Any], columns: Columns = Columns()) -> tuple[Turn, ...]:  # noqa: B008
    row = read(tmp_path, content, columns)
    assert isinstance(row, Record), row
    return row.turns


def with_turn(**keys: Any) -> dict[str, Any]:
    return {"messages": [TALK[0], {**TALK[1], **keys}]}


UNREAD_OF_A_ROW: dict[str, tuple[Any, str]] = {
    "tools": ([{"name": "search"}], "tool calls are not trained"),
    "functions": ("[{}]", "tool calls"),
    "rejected": (TALK, "preference data"),
    "chosen": ("So.", "columns.answer"),
    "choices": (["a", "b"], "into the question"),
    "options": ("A. x", "into the question"),
    "videos": (["a.mp4"], "videos are not read"),
    "audio": ("a.wav", "sound is not read"),
    "loss_weight": (0.5, "data.*.mix"),
    "weight": (0.25, "data.*.mix"),
    "train": (False, "data.*.mix"),
    "mask": ("User", "data.*.mix"),
    "loss_mask": ([0, 1], "data.*.mix"),
    "input_ids": ([1, 2], "tokenize makes the ids"),
    "labels": ([1, 2], "tokenize makes the ids"),
    "context": ("It is raining.", "name it in data.*.columns"),
    "knowledge": ("x", "in columns.ignore"),
    "reasoning_content": ("Let me see.", "in columns.ignore"),
    "turns": (TALK, "data.*.columns where it is the turns"),
    "sytem": ("You are a pirate.", "columns where it is the turns, images, text, question, answer or system"),
    "bbox": ([1, 2, 3, 4], "in columns.ignore"),
    "img": ({"bytes": "x"}, "in columns.ignore"),
}


@pytest.mark.parametrize("key", UNREAD_OF_A_ROW)
def test_a_row_that_says_more_than_is_read_is_refused_by_name(tmp_path: Path, key: str) -> None:
    value, remedy = UNREAD_OF_A_ROW[key]
    line = refused(tmp_path, {**TEXT, key: value})
    assert f"has {key!r}, which is not read -> " in line
    assert remedy in line
    for nothing in (None, "", [], {}):
        assert used(tmp_path, {**TEXT, key: nothing}) == talk("Why?", "So.")
    assert used(tmp_path, {**TEXT, key: value}, Columns(ignore=(key,))) == talk("Why?", "So.")
    assert used(tmp_path, {**TEXT, key: value}, Columns(ignore=("x", f"{key[:2]}*"))) == talk("Why?", "So.")


UNREAD_OF_A_TURN = {
    "tool_calls": [{"id": 1}], "function_call": {"name": "f"}, "reasoning_content": "hm", "refusal": "no", "name": "Bob",
    "images": ["a.png"], "thinking": "hm", "emotion": "sad", "loss_weight": 0.3, "content_detail": "x", "tool_call_id": "7",
}  # fmt: skip


@pytest.mark.parametrize("key", UNREAD_OF_A_TURN)
def test_a_turn_that_says_more_than_is_read_is_refused_by_name(tmp_path: Path, key: str) -> None:
    content = with_turn(**{key: UNREAD_OF_A_TURN[key]})
    line = refused(tmp_path, content)
    assert f"turn 1: has {key!r}, which is not read" in line
    assert "columns.ignore" in line or "tool" in line
    assert used(tmp_path, with_turn(**{key: None})) == talk("Why?", "So.")
    assert used(tmp_path, content, Columns(ignore=(key,))) == talk("Why?", "So.")


HARMLESS = {
    "id": 3, "question_id": "a", "source": "web", "data_source": "x", "score": 0.5, "split": "test", "url": "http://x/y.jpg",
    "width": 3, "height": 4, "hash": "ab", "sha256": "cd", "license": "MIT", "similarity": 0.3, "NSFW": "UNLIKELY", "imageId": "7",
    "relevance_ratings": [4, 5], "relevance_min": 4, "answer_type": "yes/no", "human_or_machine": 0, "metadata": {"a": 1},
    "created_at": "2024", "model": "gpt4", "aesthetic_score": 6.1, "num_tokens": 12, "lang": "en", "weight": 1, "train": True,
    "loss": "True", "__index_level_0__": 4, "dataset": "vqa", "width_list": [1, 2], "timestamp": 1.5, "topic": "cats",
}  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_what_a_row_says_of_itself_is_harmless(tmp_path: Path, key: str) -> None:
    assert used(tmp_path, {**TEXT, key: HARMLESS[key]}) == talk("Why?", "So.")


@pytest.mark.parametrize(("key", "masks"), [("loss", False), ("train", False), ("training", False), ("trainable", False),
                                            ("weight", 0), ("weight", 0.0), ("masked", True), ("mask", 1)])  # fmt: skip
def test_an_answer_that_is_not_to_be_trained_on_is_not(tmp_path: Path, key: str, masks: Any) -> None:
    spelled = {"from": "gpt", "value": "No."}
    for last, kind in ((ANSWER, "messages"), (spelled, "conversations")):
        asked = {"from": "human", "value": "Why?"} if kind == "conversations" else TALK[0]
        rows = {kind: [asked, {**last, key: masks}, asked, {**last, key: not masks}, asked, last]}
        assert [turn.trained for turn in used(tmp_path, rows)[1::2]] == [False, True, True]
    assert "nothing to learn" in refused(tmp_path, with_turn(**{key: masks}))
    assert [turn.trained for turn in used(tmp_path, with_turn(**{key: None}))] == [True, True]
    asked = {"messages": [{**TALK[0], key: masks}, TALK[1]]}
    assert used(tmp_path, asked) == talk("Why?", "So."), "a question is not trained on anyway"
    asked["messages"][0][key] = not masks
    assert "turn 0: only answers are trained on" in refused(tmp_path, asked)
    pairs = {"texts": [{"user": "a", "assistant": "b", key: masks}, {"user": "c", "assistant": "d"}]}
    assert [turn.trained for turn in used(tmp_path, pairs)] == [True, False, True, True]


@pytest.mark.parametrize("value", [0.5, 2, -1, "false", [0], 1e-9, float("nan")])
def test_half_a_weight_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    line = refused(tmp_path, with_turn(weight=value))
    assert "turn 1: weight " in line
    assert "set it to 0 or 1" in line


def test_masks_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    assert "loss, weight contradict" in refused(tmp_path, with_turn(loss=True, weight=0))
    assert used(tmp_path, with_turn(loss=True, weight=1, masked=False)) == talk("Why?", "So.")


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_a_row_s_system_prompt_becomes_its_system_turn(tmp_path: Path, key: str) -> None:
    system = Turn("system", ("Be brief.",))
    expected = (system, *talk("Why?", "So."))
    assert used(tmp_path, {**TEXT, key: "Be brief."}) == expected
    assert used(tmp_path, {"question": "Why?", "answer": "So.", key: "Be brief."}) == expected
    assert used(tmp_path, {"image": "a", "caption": "So.", key: "Be brief."}) == (system, *talk((0,), "So."))
    own = [{"role": "system", "content": "Be brief."}, *TALK]
    assert used(tmp_path, {"messages": own, key: "Be brief."}) == expected
    assert "which one counts" in refused(tmp_path, {"messages": own, key: "Be verbose."})
    assert "expected text" in refused(tmp_path, {**TEXT, key: ["Be brief."]})
    assert used(tmp_path, {**TEXT, key: ""}) == used(tmp_path, {**TEXT, key: None}) == talk("Why?", "So.")


def test_a_system_prompt_under_another_name_is_told_of_by_columns(tmp_path: Path) -> None:
    found = used(tmp_path, {**TEXT, "persona": "A pirate."}, Columns(system="persona"))
    assert found[0] == Turn("system", ("A pirate.",))


def test_a_second_layout_must_say_the_same_words(tmp_path: Path) -> None:
    assert used(tmp_path, {**TEXT, "prompt": " Why?\n"}) == talk("Why?", "So."), "ultrachat repeats the first question"
    assert "has messages, prompt: which one counts" in refused(tmp_path, {**TEXT, "prompt": "How?"})
    for key in ("text", "caption", "answer", "label", "input", "history"):
        assert f"{key}: which one counts? -> name what says nothing in columns.ignore" in refused(tmp_path, {**TEXT, key: "Other."})
    assert "has text, label: which one counts" in refused(tmp_path, {"image": "a", "text": "x", "label": 1})
    assert "has answer, question, text" in refused(tmp_path, {"question": "Why?", "answer": "So.", "text": "Other."})
    assert used(tmp_path, {**TEXT, "prompt": "How?"}, Columns(ignore=("prompt",))) == talk("Why?", "So.")


def test_a_picture_that_the_row_names_under_no_usual_key_is_not_lost(tmp_path: Path) -> None:
    for key in ("image_url", "img_path", "filename", "path", "imgname"):
        line = refused(tmp_path, {**TEXT, key: "cats/7.JPG"})
        assert f"{key!r} names one -> set columns.images: {key}" in line
        assert used(tmp_path, {**TEXT, key: "notes/7.md"}) == talk("Why?", "So.")
        assert used(tmp_path, {**GOOD, key: "cats/7.JPG"}) == talk((0, "\nWhat?"), "This.")
    assert used(tmp_path, {**said("<image>"), "img": "7.jpg"}, Columns(images="img")) == talk((0,), "This.")


def test_an_unknown_key_of_a_part_is_refused_and_a_known_one_is_not(tmp_path: Path) -> None:
    fine = {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}, "max_pixels": 100}
    assert used(tmp_path, said([fine, {"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}])) == talk(
        (0, "x"), "This."
    )
    assert "turn 0: a part has 'bbox', which is not read" in refused(tmp_path, said([{**fine, "bbox": [1, 2]}]))
    assert "a part has 'weight'" in refused(tmp_path, said([{"type": "text", "text": "x", "weight": 0.5}]))
    ordered = said([{"type": "image", "index": 1}, {"type": "image", "index": 0}]) | {"images": ["a", "b"]}
    assert "shows picture 1, picture 0 is next" in refused(tmp_path, ordered)


CONTAINERS = ["parquet", "arrow", "stream", "csv", "json", "tar"]


def store(folder: Path, kind: str, rows: list[dict[str, Any]], png: Png) -> str:
    """The rows in a file of a kind; a table's and a tar's are captions."""
    path, table = folder / kind, pa.Table.from_pylist(rows)
    match kind:
        case "parquet":
            pq.write_table(table, path)
        case "arrow":
            with pa.ipc.new_file(path, table.schema) as file:
                file.write_table(table)
        case "stream":
            with pa.ipc.new_stream(path, table.schema) as file:
                file.write_table(table)
        case "json":
            path.write_text(json.dumps(rows))
        case "csv":
            with path.open("w", newline="") as text:
                writer = csv.DictWriter(text, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        case _:
            members = [
                [(f"{i}.png", png(i)), (f"{i}.json", json.dumps({**row, "image": None}).encode())] for i, row in enumerate(rows)
            ]
            path.write_bytes(tarred([part for sample in members for part in sample]))
    return str(path)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_refuses_what_nobody_reads(tmp_path: Path, png: Png, kind: str) -> None:
    rows = [{"image": f"{i}.png", "caption": "So.", "source": "web", "persona": "A pirate.", "tools": ""} for i in range(3)]
    file = store(tmp_path, kind, rows, png)
    if kind in ("json", "tar"):
        assert all("has 'persona', which is not read" in row.line() for row in drain(SourceSpec(file)) if isinstance(row, BadRow))
        assert sum(isinstance(row, BadRow) for row in drain(SourceSpec(file))) == 3
    else:  # told before a row is read: the column stands in all of them
        with pytest.raises(PipelineError, match="column 'persona', which nobody reads") as caught:
            open_source(SourceSpec(file))
        assert caught.value.line().startswith(file)
        assert "columns.ignore: [persona]" in caught.value.line()
    for columns in (Columns(ignore=("persona",)), Columns(ignore=("p*",))):
        assert [row.turns for row in drain(SourceSpec(file, columns=columns)) if isinstance(row, Record)] == [talk((0,), "So.")] * 3
    system = [row.turns[0] for row in drain(SourceSpec(file, columns=Columns(system="persona"))) if isinstance(row, Record)]
    assert system == [Turn("system", ("A pirate.",))] * 3


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_column_that_is_mostly_empty_costs_the_rows_that_fill_it(tmp_path: Path, png: Png, kind: str) -> None:
    rows: list[dict[str, Any]] = [{"image": f"{i}.png", "caption": "So.", "tools": "", "system": ""} for i in range(4)]
    rows[1]["tools"], rows[2]["system"] = '[{"name": "f"}]', "Be brief."
    first, second, third, last = drain(SourceSpec(store(tmp_path, kind, rows, png)))
    assert isinstance(second, BadRow)
    assert "has 'tools'" in second.line()
    assert isinstance(third, Record)
    assert third.turns[0] == Turn("system", ("Be brief.",))
    for row in (first, last):
        assert isinstance(row, Record)
        assert row.turns == talk((0,), "So.")


def test_turns_in_arrow_have_their_masks_and_nulls_say_nothing(tmp_path: Path) -> None:
    turns = [{**TALK[0], "loss": None, "tool_calls": None}, {**TALK[1], "loss": False, "tool_calls": None},
             {**TALK[0], "loss": None, "tool_calls": None}, {**TALK[1], "loss": None, "tool_calls": None}]  # fmt: skip
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "rows")
    (row,) = drain(SourceSpec(str(tmp_path / "rows")))
    assert isinstance(row, Record)
    assert [turn.trained for turn in row.turns] == [True, False, True, True]


def test_members_of_a_tar_that_nobody_reads_are_refused_by_name(tmp_path: Path, png: Png) -> None:
    others = [("cls", b"7"), ("mp4", b"x"), ("seg.png", b"x"), ("npy", b"")]
    members = [[(f"{i}.png", png(i)), (f"{i}.txt", b"a"), (f"{i}.{kind}", data)] for i, (kind, data) in enumerate(others)]
    (tmp_path / "tar").write_bytes(tarred([part for sample in members for part in sample]))
    one, two, three, four = drain(SourceSpec(str(tmp_path / "tar")), read=True)
    assert isinstance(one, Record)
    assert isinstance(four, Record), "an empty member says nothing"
    assert isinstance(two, BadRow)
    assert "has '.mp4', which is not read" in two.line()
    assert isinstance(three, BadRow)
    assert "has '.seg.png', which is not read" in three.line()
    assert all(isinstance(row, Record) for row in drain(SourceSpec(str(tmp_path / "tar"), columns=Columns(ignore=(".*",)))))


def test_what_img2dataset_leaves_beside_a_caption_is_read_or_refused(tmp_path: Path, png: Png) -> None:
    left = {"caption": "a", "url": "http://x/0.jpg", "key": "000", "status": "success", "error_message": None, "width": 3,
            "height": 4, "original_width": 6, "original_height": 8, "exif": "{}", "sha256": "ab"}  # fmt: skip
    members = [("0.png", png(0)), ("0.txt", b"a"), ("0.json", json.dumps(left).encode()),
               ("1.png", png(1)), ("1.txt", b"b"), ("1.json", json.dumps({**left, "story": "Once."}).encode())]  # fmt: skip
    (tmp_path / "tar").write_bytes(tarred(members))
    one, two = drain(SourceSpec(str(tmp_path / "tar")), read=True)
    assert isinstance(one, Record)
    assert one.turns == talk((0,), "a")
    assert isinstance(two, BadRow)
    assert "has 'story'" in two.line()


def test_columns_are_those_of_params_and_travel_to_workers() -> None:
    assert {*ColumnsSection.model_fields} == {name for name in Columns.__dataclass_fields__ if not name.startswith("_")}
    columns = Columns(answer="reply", ignore=("x*",))
    columns.look(("messages", "xyz"))
    assert pickle.loads(pickle.dumps(columns)) == columns
    assert hash(columns) == hash(Columns(answer="reply", ignore=("x*",)))


def test_a_named_column_takes_the_place_of_the_usual_ones(tmp_path: Path) -> None:
    row = {"image": "a", "caption": "short", "text": "long", "alt": "x"}
    assert used(tmp_path, row, Columns(text="text", ignore=("alt",))) == talk((0,), "long")
    assert used(tmp_path, row, Columns(text="alt")) == talk((0,), "x")
    asked = {"image": "a", "question": "Why?", "caption": "So.", "answer": "No."}
    assert used(tmp_path, asked, Columns(answer="caption")) == talk((0, "\nWhy?"), "So.")
    assert used(
        tmp_path, {"chosen": [ASKED, ANSWER], "rejected": TALK, "images": ["a"]}, Columns(turns="chosen", ignore=("rejected",))
    )


def test_many_sets_of_keys_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.records.formats.keys.REMEMBERED", 10)
    columns = Columns()
    for number in range(100):
        assert columns.look(("messages", f"key{number}")).closely == (f"key{number}",)
        assert len(columns._looks) <= 10
