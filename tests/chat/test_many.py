"""A question of a whole folder, or of the rows of a file; and what is written down."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from projects import with_path
from rich.console import Console
from terminals import ROOT
from test_chat import run, trained  # noqa: F401

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.options import Settings
from pipeline.chat.paths import find_pictures
from pipeline.chat.terminal import Talk
from pipeline.chat.thumbnail import COLUMNS, LINES, thumbnail


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    """Five pictures, one with a comma in its name, one in a folder within, and what is to be left out or listed."""
    made = tmp_path / "pictures"
    (made / "within").mkdir(parents=True)
    for number, name in enumerate(("b.png", "a, really.png", "C.PNG", "within/d.png", "e.png")):
        shutil.copy(world.folder / f"images/{number}.png", made / name)
    (made / "broken.jpg").write_bytes(b"no picture")
    (made / ".hidden.png").write_bytes(b"")
    (made / "notes.txt").write_text("no picture either")
    return made


def rows(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches in float32, as one answer on a CPU always is: random weights have ties that bfloat16 decides by chance."""
    monkeypatch.setattr("pipeline.chat.assistant.pick_precision", lambda *_: "float32")


def test_every_picture_of_a_folder_is_answered_and_a_bad_one_is_listed(trained: Path, folder: Path) -> None:
    result = run(str(folder), "What is this?", "--model", str(trained), "--max-tokens", "4")
    assert result.exit_code == 0, result.output
    found = {str(row["pictures"][0]): row for row in rows(result.stdout)}
    wanted = ["C.PNG", "a, really.png", "b.png", "broken.jpg", "e.png", "within/d.png"]
    assert list(found) == [str(folder / name) for name in wanted]
    assert "not a picture" in found.pop(str(folder / "broken.jpg"))["error"]
    assert "5 answered, 1 could not be" in result.stderr
    assistant = Assistant(trained)
    for path, row in found.items():
        talk = Conversation()
        assistant.ask(talk, "What is this?", assistant.look(path))
        assert row["answer"] == "".join(assistant.answer(talk, Sampling(4))).strip()


def test_a_folder_that_cannot_be_listed_is_not_passed_over(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def fail(path: str) -> Any:
        if str(path) == str(folder):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", fail)
    result = run(str(folder), "What?", "--model", str(trained))
    assert result.exit_code != 0
    assert f"{folder.name}: cannot be listed: Permission denied" in result.stderr


def test_rows_of_a_file_have_questions_of_their_own(trained: Path, folder: Path, tmp_path: Path) -> None:
    asked = [
        {"id": 7, "image": "a, really.png", "question": "What is this?"},
        {"question_id": "x", "image": "b.png,e.png", "text": "<image>\n<image>\nWhich is it?"},
        {"images": ["b.png", "within/d.png"], "question": "And these?"},
        {"question": "What is a circle?"},
        {"image": "nowhere.png", "question": "What?"},
        {"image": "b.png"},
        {"image": 7, "question": "What?"},
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked) + "{broken\n", encoding="utf-8")
    saved = tmp_path / "out.jsonl"
    result = run(str(folder / "q.jsonl"), "--model", str(trained), "--max-tokens", "4", "--save", str(saved))
    assert result.exit_code == 0, result.output
    first, second, third, fourth, *bad = rows(result.stdout)
    assert (first["id"], len(first["pictures"])) == (7, 1)
    assert (second["question_id"], second["question"], len(second["pictures"])) == ("x", "Which is it?", 2)
    assert len(third["pictures"]) == 2
    assert fourth["pictures"] == []
    assert all("answer" in row for row in (first, second, third, fourth))
    assert [row["error"].partition(" ->")[0] for row in bad[:3]] == [
        "no such image", "line 6: no question", "line 7: `image` is no name of a file",
    ]  # fmt: skip
    assert "line 8" in bad[3]["error"]
    written = rows(saved.read_text(encoding="utf-8"))
    assert [row["answer"] for row in written[:4]] == [row["answer"] for row in (first, second, third, fourth)]


def test_many_questions_about_one_picture_encode_it_once(trained: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.features import Encoder

    seen = []
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, pixels, names: seen.append(len(pixels)) or encode(self, pixels, names))
    lines = [{"image": "b.png", "question": f"What is {number}?"} for number in range(60)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    result = run(str(folder / "q.jsonl"), "--model", str(trained), "--max-tokens", "2")
    assert len(rows(result.stdout)) == 60
    assert sum(seen) == 1


@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (lambda folder: folder.mkdir(), ["What?"], "no pictures here"),
        (lambda folder: folder.mkdir(), [], "a folder needs a question"),
        (lambda folder: (folder.mkdir(), (folder / "a.png").touch()), ["What?"], "nothing here could be answered"),
        (lambda folder: folder.mkdir(), ["What?", "--save", "x.pdf"], "a transcript is .jsonl or .md"),
        (lambda folder: folder.mkdir(), ["What?", "--save", "nowhere/x.md"], "nowhere/x.md: cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    trained: Path, tmp_path: Path, make: Callable[[Path], object], arguments: list[str], words: str
) -> None:
    make(tmp_path / "p")
    result = run(str(tmp_path / "p"), *arguments, "--model", str(trained))
    assert result.exit_code != 0
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_a_question_of_bytes_that_are_no_text_is_one_line(trained: Path, folder: Path) -> None:
    command = [sys.executable, "-m", "pipeline.chat", str(folder / "b.png"), b"what \xff?", "--model", str(trained)]
    env = {**os.environ, "PYTHONPATH": with_path(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the question is not UTF-8 -> type it in a terminal whose encoding is UTF-8"


def talk_of(trained: Path, **options: object) -> Talk:
    return Talk(Assistant(trained, device="cpu"), Sampling(4), Settings(trained, (4, 0.0, 1.0, 0), "cpu", **options))


def test_image_begins_a_topic_and_also_adds_to_it(trained: Path, folder: Path) -> None:
    talk = talk_of(trained)
    talk.obey(f"/image {folder}/b.png")
    talk.say("What is this?")
    talk.obey(f"/also {folder}/e.png")
    talk.say("And this?")
    assert (len(talk.conversation.turns), len(talk.conversation.features)) == (4, 2)
    talk.obey(f"'{folder}/a, really.png'")  # dragged
    talk.say("What is this?")
    assert (len(talk.conversation.turns), len(talk.conversation.features)) == (2, 1)


def test_a_missing_picture_is_said_before_the_answer(trained: Path, folder: Path) -> None:
    typed = f"What?\n/image {folder}/b.png\nWhat?\n/also nowhere.png\nWhat?\n/image {folder}/broken.jpg\nWhat?\nWhat?\n"
    result = run("--model", str(trained), "--max-tokens", "2", typed=typed)
    said = [line for line in result.stderr.splitlines() if line.startswith("(no picture")]
    assert len(said) == 3, result.stderr
    assert said[0].startswith("(no picture is shown: the answer is about none")
    assert said[1] == "(no picture from nowhere.png is shown)"
    assert said[2] == f"(no picture from {folder}/broken.jpg is shown)"


def test_a_transcript_can_be_read_again(trained: Path, folder: Path, tmp_path: Path) -> None:
    typed = f"/image {folder}/b.png\nWhat is this?\nAnd that?\n/image {folder}/e.png\nWhat is it?\n"
    for name in ("talk.jsonl", "talk.md"):
        result = run("--model", str(trained), "--max-tokens", "3", "--stats", "--save", str(tmp_path / name), typed=typed)
        assert result.exit_code == 0, result.output
    assert result.stderr.count(" tokens, ") == 3
    written = rows((tmp_path / "talk.jsonl").read_text(encoding="utf-8"))
    assert [row["topic"] for row in written] == [1, 1, 2]
    assert [row["pictures"] for row in written] == [[f"{folder}/b.png"], [], [f"{folder}/e.png"]]
    assert [row["answer"] for row in written] == [line.strip() for line in result.stdout.strip("\n").split("\n")]
    page = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert page.count("![") == 2
    assert find_pictures(page.partition("](<")[2].partition(">)")[0]) == [folder / "b.png"]


def test_a_thumbnail_is_the_picture_in_half_blocks(world: World) -> None:
    shown = thumbnail((world.folder / "images/0.png").read_bytes(), where="0.png")
    lines = shown.plain.splitlines()
    assert len(lines) <= LINES
    assert {len(line) for line in lines} == {max(map(len, lines))}
    assert max(map(len, lines)) <= COLUMNS
    console = Console(force_terminal=True, color_system="truecolor", width=100)
    with console.capture() as captured:
        console.print(shown)
    assert "38;2;" in captured.get()
