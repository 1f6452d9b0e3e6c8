"""A row that only the chat template or the tokenizer refuses is a bad row like any other: named, listed, skipped, counted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, PATCHES, World, len_of, row
from projects import Project

from pipeline.core.errors import PipelineError
from pipeline.records.formats import BadRow, SourceSpec, open_source
from pipeline.text.builder import PromptBuilder
from pipeline.text.tokenization import RowTokenizer, Summary, tokenize

SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *row("Is it?", "Yes.")["messages"]]}  # type: ignore[misc]
LONG = {"messages": [turn for _ in range(4) for turn in row("Is it?", "Yes.")["messages"]]}  # type: ignore[attr-defined]


def refusing(condition: str, what: str) -> str:
    return f"{{% if {condition} %}}{what}{{% endif %}}" + CHATML


DROPPING = CHATML.replace("for message in messages", "for message in messages if message['role'] != 'system'")
NO_SYSTEM = "{{ raise_exception('System role not supported') }}"
SYSTEM_FIRST, EIGHT = "messages[0]['role'] == 'system'", "messages | length == 8"
TEMPLATES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a role that is not supported": (refusing(SYSTEM_FIRST, NO_SYSTEM), SYSTEM, "System role"),
    "turns that must alternate": (
        "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}" + CHATML, SYSTEM, "must alternate"),
    "a system turn that is dropped": (DROPPING, SYSTEM, "drops turns"),
    "a talk too long for it": (refusing(EIGHT, "{{ raise_exception('at most three questions') }}"), LONG, "at most three"),
    "something undefined": (refusing(EIGHT, "{{ messages[99]['role'] + 'x' }}"), LONG, "refuses turns user, assistant"),
    "a division by zero": (refusing(EIGHT, "{{ 1 // 0 }}"), LONG, "division"),
    "a key that is missing": (refusing(EIGHT, "{{ {}.popitem() }}"), LONG, "refuses turns"),
    "text and numbers added": (refusing(EIGHT, "{{ 1 + 'x' }}"), LONG, "unsupported operand"),
    "a filter of the wrong type": (refusing(EIGHT, "{{ 3 | join }}"), LONG, "not iterable"),
}  # fmt: skip


@pytest.fixture(params=TEMPLATES)
def refused(request: pytest.FixtureRequest, llm_folder: Path, tmp_path: Path) -> tuple[Path, dict[str, Any], str]:
    """A model's folder whose template refuses the row that is given, and the reason."""
    template, content, reason = TEMPLATES[request.param]
    shutil.copytree(llm_folder, tmp_path / "llm")
    (tmp_path / "llm" / "chat_template.jinja").write_text(template)
    return tmp_path / "llm", content, reason


def test_such_rows_are_listed_in_order_and_all_others_used(
    world: World, refused: tuple[Path, dict[str, Any], str], tmp_path: Path
) -> None:
    folder, content, reason = refused
    builder = PromptBuilder(str(folder), image_token="<image>", tokens=PATCHES)
    rows = [
        content,
        row("Is it?", "Yes."),
        content,
        {"messages": 3},
        row("<image>", "A dog.", "dog.png"),
        content,
        row("Is?", "No."),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    source = open_source(SourceSpec(str(tmp_path / "rows.jsonl"), str(world.images.path)))
    bad, total = list[BadRow](), Summary()
    tokenizer = RowTokenizer(builder, source.images, 256, "cut")
    batches = list(tokenize(source.records(), tokenizer, total, workers=2, progress=len_of, reject=bad.append))
    assert [found.row for found in bad] == [1, 3, 4, 5, 6]
    for found in (bad[0], bad[1], bad[4]):
        assert reason in found.line()
        assert found.line().startswith(f"{tmp_path}/rows.jsonl:{found.row}: ")
        assert len(found.line().splitlines()) == 1
    assert (total.rows_in, total.rows, total.bad) == (7, 2, 5)
    assert [one["where"] for batch in batches for one in batch.to_pylist()] == [f"{tmp_path}/rows.jsonl:{n}" for n in (2, 7)]
    with pytest.raises(PipelineError, match=r"rows\.jsonl:1: "):
        list(tokenize(source.records(), tokenizer, Summary(), workers=1, progress=len_of))


def test_a_text_that_the_tokenizer_refuses_is_such_a_row_too(world: World, tmp_path: Path) -> None:
    def build_batch(conversations: list[Any], **_: Any) -> Any:
        if any("gate" in str(turns) for turns in conversations):
            raise PipelineError("the text 'gate' yields a control token", where="llm")
        return original(conversations)

    builder = PromptBuilder(str(world.llm), image_token="<image>", tokens=PATCHES)
    original, builder.build_batch = builder.build_batch, build_batch  # type: ignore[method-assign,assignment]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row(text, "Yes.")) + "\n" for text in ("a gate", "a", "gates", "b")))
    bad, total = list[BadRow](), Summary()
    rows = open_source(SourceSpec(str(tmp_path / "rows.jsonl"))).records()
    list(tokenize(rows, RowTokenizer(builder, world.images, 256, "cut"), total, workers=1, progress=len_of, reject=bad.append))
    assert ([found.row for found in bad], total.rows) == ([1, 3], 2)


def test_the_stage_skips_and_lists_them_or_stops_with_all_of_them(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]
) -> None:
    template = TEMPLATES["a role that is not supported"][0]
    shutil.copytree(world.llm, tmp_path / "gemma")
    (tmp_path / "gemma" / "chat_template.jinja").write_text(template)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    made = Project(world, tmp_path / "project")
    for number in range(6):
        (made.pictures / f"{number}.png").write_bytes(png(number))
    shown = [row(f"<image>\nWhat is this {n}?", "A square.", f"{n}.png") for n in range(4)]
    made.write("pretrain.jsonl", [*shown, SYSTEM])
    made.write("sft.jsonl", [SYSTEM, *shown, row("Is it?", "No."), SYSTEM])
    made.write("heldout.jsonl", [row("<image>", "A dog.", "5.png")])
    made.set(f"llm.model={tmp_path / 'gemma'}", "data.on_error=stop")
    made.run("extract")
    with pytest.raises(
        PipelineError, match=r"1 of 5 rows are bad .*pretrain\.jsonl:5 \(its chat template refuses turns system, user"
    ):
        made.run("tokenize")
    made.set("data.on_error=skip", "data.max_bad_share=0.5")
    figures = made.run("tokenize")
    assert figures["sft"]["rows_in"] == 7 == figures["sft"]["rows"] + figures["sft"]["rejected"]
    listed = made.listed("tokens/rejected_sft.csv")
    assert [(one["file"], one["row"]) for one in listed] == [("data/mine/sft.jsonl", "1"), ("data/mine/sft.jsonl", "7")]
    assert all("System role not supported" in one["reason"] and one["remedy"] for one in listed)
