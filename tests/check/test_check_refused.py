"""What the check says of rows that read well and cannot be used: refused by the template, or with no picture to learn from."""

import shutil
import sys
from pathlib import Path

import pytest
from checked import Project, flat, project, require_one_line  # noqa: F401
from conftest import CHATML, ROWS, row

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
SYSTEM = {"messages": [{"role": "system", "content": "Be brief."}, *row("Is it?", "Yes.")["messages"]]}  # type: ignore[misc]


def test_a_row_that_the_template_refuses_is_named_before_any_stage(project: Project, llm_folder: Path) -> None:
    shutil.copytree(llm_folder, project.folder / "gemma")
    (project.folder / "gemma" / "chat_template.jinja").write_text(NO_SYSTEM)
    project.set(llm__model=str(project.folder / "gemma"))
    project.write("rows", ROWS[0], SYSTEM, ROWS[1], SYSTEM)
    run = project.run("rows.jsonl", "--images", "images")
    assert run.exit_code == 3, run.output
    said = flat(run.stdout)
    assert "rows 4: 2 good, 2 bad" in said
    for number in (2, 4):
        assert f"rows.jsonl:{number}: its chat template refuses turns system, user, assistant: System role not supported ->" in said


TEXT = [row("Is there a square?", "Yes."), row("Is it red?", "No.")]


def test_a_data_set_without_a_picture_is_sound_where_text_is_enough(project: Project) -> None:
    project.write("pretrain", *ROWS[:3])
    project.write("heldout", row("<image>", "A dog.", "4.png"), *TEXT)
    project.write("sft", *TEXT)
    run = project.run()
    assert run.exit_code == 0, run.output
    assert "2 with text only (100 %); 0 <image> in all" in flat(run.stdout)
    project.set(sft__train="projector")
    assert "data.sft: " in require_one_line(project.run(), 3)
    alone = project.run("sft.jsonl")
    assert alone.exit_code == 0, alone.output
    assert "extract: no pictures" in alone.stdout
    project.set(sft__train="all")
    project.write("pretrain", *TEXT)
    line = require_one_line(project.run("--html", "page.html"), 3)
    assert "data.pretrain: " in line
    assert "no row shows a picture" in line
    assert "belong in data.sft" in line


@pytest.mark.parametrize("place", [0, 1, 2])
def test_stretches_of_text_alone_change_no_figure(project: Project, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["pipeline.check.survey"], "CHUNK", 4)  # the room has a function of that name
    shown = [ROWS[0], ROWS[1], ROWS[2], ROWS[3], ROWS[5], ROWS[6], ROWS[7], ROWS[10]]
    parts = [shown[:4], shown[4:]]
    parts.insert(place, TEXT * 4)
    project.write("rows", *(one for part in parts for one in part))
    run = project.run("rows.jsonl", "--images", "images", "--html", "page.html")
    assert run.exit_code == 0, run.output
    said = flat(run.stdout)
    assert "rows 16, all good" in said
    assert "6 with one picture (37.5 %), 2 with several (12.5 %), 8 with text only (50 %); 10 <image> in all" in said
    assert "10 named in rows, 6 distinct names" in said
