"""The page without a browser: who may reach it, what may be brought, and that no one has another's talk. Gradio is not needed."""

import asyncio
import re
import shutil
import socket
import subprocess
import sys
import threading
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from PIL import Image
from test_chat import trained  # noqa: F401

from pipeline.chat import visitors as module
from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.guard import MAX_BODY, MAX_UPLOAD, Guard
from pipeline.chat.visitors import Exchange, Models, Visitors
from pipeline.chat.web import find_models
from pipeline.core.errors import PipelineError

ROOT = Path(__file__).parents[2]


def request(
    path: str, *pieces: bytes, method: str = "POST", host: str = "127.0.0.1:7860", **headers: str
) -> tuple[int, bytes, bytes]:
    """Status and text of the answer, and the body that the guarded application saw."""
    seen, sent = bytearray(), []

    async def app(_: Any, receive: Any, send: Any) -> None:
        while True:
            message = await receive()
            seen.extend(message.get("body", b""))
            if not message.get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"fine"})

    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces] + [
        {"type": "http.request", "body": b""}
    ]

    async def receive() -> Any:
        return waiting.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    names = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    scope = {"type": "http", "method": method, "path": path, "headers": [(k.encode(), v.encode()) for k, v in names.items()]}
    asyncio.run(Guard(app)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], bytes(seen)


def form(*files: bytes) -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return b"".join(head + data + b"\r\n" for data in files) + b"--edge--\r\n"


FORM = {"content_type": "multipart/form-data; boundary=edge"}


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:7860", "", "192.168.1.2:7860", "[::1]:7860", "localhost.:7860"]
)
def test_another_host_is_refused_whatever_it_asks(host: str) -> None:
    for method in ("GET", "POST"):
        status, text, seen = request("/", host=host, method=method)
        assert (status, seen) == (421, b"")
        assert text == b"this page is at 127.0.0.1"


def test_this_machine_by_its_names_is_served() -> None:
    for host in ("127.0.0.1:7860", "localhost:7860", "localhost"):
        assert request("/", method="GET", host=host)[0] == 200


def test_a_picture_arrives_as_it_was_sent(world: World) -> None:
    body = form((world.folder / "images/0.png").read_bytes(), (world.folder / "images/1.png").read_bytes())
    pieces = [body[start : start + 100] for start in range(0, len(body), 100)]
    assert request("/gradio_api/upload", *pieces, **FORM) == (200, b"fine", body)


@pytest.mark.parametrize("files", [[b"no picture"], [b"\x89PNG\r\n\x1a\n ...", b"<html>"], [b""], [], [b"PK\x03\x04"], [b"<svg>"]])
def test_what_begins_as_no_picture_is_refused_unstored(files: list[bytes]) -> None:
    status, text, seen = request("/gradio_api/upload", form(*files), **FORM)
    assert (status, seen) == (415, b"")
    assert text.startswith(b"not a picture")


def test_a_body_is_bounded_whatever_it_says_of_its_length() -> None:
    piece = b"x" * (1 << 20)
    for path, limit in (("/gradio_api/upload", MAX_UPLOAD), ("/gradio_api/queue/join", MAX_BODY)):
        status, text, seen = request(path, *[piece] * ((limit >> 20) + 1), b"x", content_length="5", **FORM)
        assert (status, seen) == (413, b"")
        assert text.startswith(b"too large")


@pytest.fixture
def page(trained: Path, tmp_path: Path) -> Visitors:
    return Visitors(Models([trained], lambda folder: Assistant(folder, device="cpu")), tmp_path)


def ask(page: Visitors, name: str, text: str, *pictures: Path, **drawn: Any) -> Exchange:
    exchange = Exchange([str(path) for path in pictures], text)
    for _ in page.ask(page.get(name), exchange, page.models.names[0], Sampling(4, **drawn)):
        pass
    return exchange


def test_the_page_answers_as_chat_does(page: Visitors, world: World, trained: Path) -> None:
    first, second = world.folder / "images/0.png", world.folder / "images/1.png"
    said = [ask(page, "a", "What is it?", first), ask(page, "a", "And these?", second, first), ask(page, "a", "Sure?")]
    assistant, talk = Assistant(trained, device="cpu"), Conversation()
    for exchange, pictures in zip(said, ([first], [second, first], []), strict=True):
        assistant.ask(talk, exchange.question, [assistant.look(path) for path in pictures])
        assert "".join(assistant.answer(talk, Sampling(4))).strip() == exchange.answer
        assert not exchange.failed
    roles = [message["role"] for message in page.get("a").messages()]
    assert roles == ["user"] * 2 + ["assistant"] + ["user"] * 3 + ["assistant"] + ["user", "assistant"]


def test_what_goes_wrong_is_said_in_the_talk_and_joins_none(page: Visitors, world: World, tmp_path: Path) -> None:
    bad = tmp_path / "0a1b2c/none.png"
    bad.parent.mkdir()
    bad.write_bytes(b"\x89PNG\r\n\x1a\n no picture")
    failed = ask(page, "a", "What is it?", bad)
    assert failed.failed
    assert failed.answer.startswith("none.png: not a picture")
    assert str(tmp_path) not in failed.answer
    assert "row" not in failed.answer
    assert page.get("a").messages()[-1]["content"].startswith("⚠ none.png")
    long = ask(page, "a", "what is this? " * 1000)
    assert "begin a new topic, or ask in fewer words" in long.answer
    alone = ask(page, "b", "What is it?", world.folder / "images/0.png")
    assert ask(page, "a", "What is it?", world.folder / "images/0.png").answer == alone.answer


def test_eight_people_at_once_each_have_their_own_answer(page: Visitors, world: World) -> None:
    pictures = [world.folder / f"images/{number % 6}.png" for number in range(8)]
    alone = [ask(page, f"alone {number}", f"What is {number}?", picture).answer for number, picture in enumerate(pictures)]
    given: dict[int, str] = {}

    def person(number: int) -> None:
        given[number] = ask(page, f"person {number}", f"What is {number}?", pictures[number]).answer

    threads = [threading.Thread(target=person, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [given[number] for number in range(8)] == alone
    for number in range(8):
        assert [exchange.pictures for exchange in page.get(f"person {number}").exchanges] == [[str(pictures[number])]]


def test_a_stopped_answer_keeps_what_was_said(page: Visitors) -> None:
    visitor, exchange = page.get("a"), Exchange([], "What is it?")
    steps = page.ask(visitor, exchange, page.models.names[0], Sampling(300, temperature=9.0))
    next(steps)
    next(steps)
    visitor.stop.set()
    assert len(list(steps)) < 50
    assert exchange.answer
    assert not ask(page, "a", "And now?").failed


def test_files_go_with_the_page_that_brought_them(
    page: Visitors, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example, mine, ours, unsent, fresh = (tmp_path / f"{name}/a.png" for name in ("example", "mine", "ours", "unsent", "fresh"))
    for path in (example, mine, ours, unsent):
        path.parent.mkdir()
        shutil.copy(world.folder / "images/0.png", path)
        if path == example:
            page.keep_files()
    ask(page, "a", "What?", example, mine, ours)
    ask(page, "b", "What?", ours)
    monkeypatch.setattr(module, "UNSENT", -1.0)
    fresh.parent.mkdir()
    page.leave("a")
    assert [path.exists() for path in (example, mine, ours, unsent)] == [True, False, True, False]
    page.leave("b")
    assert not ours.exists()
    assert page.get("a").exchanges == []


def test_the_last_answer_is_looked_back_at_and_its_picture_goes_with_the_page(page: Visitors, world: World, tmp_path: Path) -> None:
    for name in ("0.png", "1.png"):  # what is uploaded goes with the page
        (tmp_path / name).write_bytes(world.images.read(name))
    visitor = page.get("one")
    with pytest.raises(PipelineError, match="no answer yet"):
        page.look_back(visitor, "gradient")
    ask(page, "one", "What is this?", tmp_path / "0.png")
    ask(page, "one", "And of these?", tmp_path / "1.png")
    made = page.look_back(visitor, "rollout")
    with Image.open(made) as sheet:
        assert sheet.height > 2 * 160  # a line for each of the two pictures
    page.leave("one")
    assert not made.exists()
    ask(page, "two", "What is this?")
    with pytest.raises(PipelineError, match="no picture was shown"):
        page.look_back(page.get("two"), "gradient")


def test_another_model_begins_a_new_topic_and_only_offered_ones_load(page: Visitors, trained: Path) -> None:
    ask(page, "a", "What?")
    visitor = page.get("a")
    for _ in page.ask(visitor, Exchange([], "What?"), "/etc", Sampling(2)):
        pass
    assert [exchange.answer for exchange in visitor.exchanges] == ["/etc: no such model"]
    with pytest.raises(PipelineError):
        page.models.get("elsewhere")
    assert find_models(trained)[0] == trained


def test_without_a_model_it_says_which_command_makes_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.web", "--model", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip() == f"error: {tmp_path}: no trained model here -> dvc repro, or --model models/sft"


def test_a_taken_port_is_told_before_a_model_is_loaded(trained: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "pipeline.web", "--model", str(trained), "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "is taken -> give another --port" in done.stderr


def test_the_lock_holds_versions_that_gradio_takes() -> None:
    pytest.importorskip("gradio")
    from packaging.requirements import Requirement

    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    locked = {name.lower().replace("_", "-"): version for name, version in lines}
    wanted = [Requirement(text) for text in metadata.requires("gradio") or []]
    asked = [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert {each.name for each in asked} & set(locked)
    refused = [str(each) for each in asked if each.name in locked and locked[each.name] not in each.specifier]
    assert not refused
