"""The page in a real browser (headless Chromium): show a picture, ask, stop, retry; eight people at once; what is refused.

Needs the extra `web`, playwright and a Chromium on PATH; skipped without. With GLANCE_SCREENSHOTS=docs/page the
screenshots go there.
"""

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import World
from test_chat import trained  # noqa: F401

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.visitors import Models, Visitors
from pipeline.chat.web import HOST, _door, build_app, load_gradio

playwright = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
pytest.importorskip("gradio", reason="the page needs the extra `web`")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models/sft"
WAIT = 60_000  # milliseconds


class Served:
    """The page of a model, served on a free port by a thread."""

    def __init__(self, model: Path, folder: Path, *, max_tokens: int = 8) -> None:
        import uvicorn

        self.folder, self.model = folder, model
        self.door = _door(0)
        self.url = f"http://{HOST}:{self.door.getsockname()[1]}"
        self.visitors = Visitors(Models([model], lambda chosen: Assistant(chosen, device="cpu")), folder)
        app = build_app(load_gradio(folder), self.visitors, Sampling(max_tokens))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self.door]})
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=30)
        self.door.close()


@pytest.fixture(scope="module")
def served(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    before = {name: os.environ.get(name) for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED")}
    page = Served(trained, folder)
    yield page
    page.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def open_page(browser: Any, served: Served, **options: Any) -> Any:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(WAIT)
    page.goto(served.url)
    page.wait_for_selector("#box textarea")
    return page


def bring(page: Any, *pictures: Path) -> None:
    page.set_input_files("#box input[type=file]", [str(path) for path in pictures])
    page.wait_for_function(f"document.querySelectorAll('#box img').length == {len(pictures)}")


def answers(page: Any) -> list[str]:
    return [text.strip() for text in page.locator("#talk .bot.message").all_inner_texts()]


def ask(page: Any, text: str) -> str:
    before = len(answers(page))
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")
    page.wait_for_function(f"document.querySelectorAll('#talk .bot.message').length > {before}")
    page.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#retry').disabled")
    return answers(page)[-1]


def expected(served: Served, text: str, *pictures: Path) -> str:
    assistant, talk = served.visitors.models.get(str(served.model)), Conversation()
    assistant.ask(talk, text, [assistant.look(path) for path in pictures])
    return "".join(assistant.answer(talk, Sampling(8))).strip()


def plain(text: str) -> str:
    """As a browser shows it: runs of white space are one, and it has its own idea of control characters."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def test_where_it_looked_is_drawn_and_gone_with_the_page(browser: Any, served: Served, world: World) -> None:
    page = open_page(browser, served)
    page.click("#looked button")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#said').innerText.includes('no answer yet')")
    bring(page, world.folder / "images/0.png")
    ask(page, "What is this?")
    page.click("#draw")
    page.wait_for_function("document.querySelector('#sheet img')?.naturalWidth > 300")
    assert "Pixels" in page.locator("#said").inner_text()
    page.close()
    deadline = time.monotonic() + 30
    while list(served.folder.rglob("looked-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(served.folder.rglob("looked-*"))


def test_a_picture_is_shown_asked_about_and_answered_again(browser: Any, served: Served, world: World) -> None:
    page = open_page(browser, served)
    assert page.title() == "Glance"
    picture = world.folder / "images/0.png"
    bring(page, picture)
    wanted = plain(expected(served, "What is this?", picture))
    assert plain(ask(page, "What is this?")) == wanted
    assert page.locator("#talk .user img").count() == 1
    assert page.locator("#shown img").first.is_visible()
    page.click("#retry")
    page.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#retry').disabled")
    assert [plain(answer) for answer in answers(page)] == [wanted]
    bring(page, world.folder / "images/1.png", world.folder / "images/2.png")
    ask(page, "And which of these?")
    assert page.locator("#talk .user img").count() == 3
    page.click("#new")
    page.wait_for_function("document.querySelectorAll('#talk .bot.message').length == 0")
    page.context.close()


def test_the_talk_is_gone_with_the_page(browser: Any, served: Served, world: World) -> None:
    def brought() -> set[str]:
        return {path.name for path in served.folder.rglob("*.png") if path.name[0].isdigit()}

    page = open_page(browser, served)
    bring(page, world.folder / "images/3.png")
    ask(page, "What is this?")
    assert "3.png" in brought()
    page.context.close()
    for _ in range(100):
        if not brought():
            break
        time.sleep(0.2)
    assert not brought()


def test_stop_ends_an_answer_and_the_talk_goes_on(browser: Any, served: Served) -> None:
    page = open_page(browser, served)
    page.click("#settings button")
    for label, value in (("Longest answer", "400"), ("Temperature", "2")):
        field = page.locator(f"#settings .block:has-text('{label}') input[type=number]").first
        field.fill(value)
        field.blur()
    page.fill("#box textarea", "What is it?")
    page.press("#box textarea", "Enter")
    page.wait_for_function("!document.querySelector('#stop').disabled")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#retry').disabled")
    assert len(answers(page)) == 1
    page.context.close()


def test_what_cannot_be_answered_is_said_in_words(browser: Any, served: Served, world: World, tmp_path: Path) -> None:
    page = open_page(browser, served)
    assert "begin a new topic, or ask in fewer words" in ask(page, "x" * 10_000)
    for name, data, words in (
        ("words.png", b"no picture", "not a picture"),
        ("words.txt", b"no picture", "Invalid file type"),
        ("large.png", b"\x89PNG\r\n\x1a\n" + bytes(40 << 20), "maximum"),
    ):
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#box input[type=file]", str(tmp_path / name))
        page.wait_for_function(f"document.body.innerText.includes({words!r})")
    (tmp_path / "half.png").write_bytes((world.folder / "images/0.png").read_bytes()[:60])
    bring(page, tmp_path / "half.png")
    said = ask(page, "What is this?")
    assert "half.png: not a picture" in said
    assert str(served.folder) not in page.inner_text("body")
    assert "row" not in said
    ask(page, "What is it?")
    assert "⚠" not in answers(page)[-1]
    page.context.close()


def test_eight_people_at_once_see_their_own_talk_alone(browser: Any, served: Served, world: World) -> None:
    pages = [open_page(browser, served) for _ in range(8)]
    for number, page in enumerate(pages):
        bring(page, world.folder / f"images/{number % 6}.png")
        page.fill("#box textarea", f"What is {number}?")
    for page in pages:
        page.press("#box textarea", "Enter")
    for number, page in enumerate(pages):
        page.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('#retry').disabled")
        assert plain(answers(page)[0]) == plain(expected(served, f"What is {number}?", world.folder / f"images/{number % 6}.png"))
        shown = page.inner_text("#talk")
        assert [other for other in range(8) if f"What is {other}?" in shown] == [number]
        assert page.locator("#talk .user img").count() == 1
    for page in pages:
        page.context.close()


@pytest.mark.skipif(not (DEMO / "glance.json").is_file(), reason="screenshots need the demo's model: make demo")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("page-desktop", {"viewport": {"width": 1200, "height": 800}}),
        ("page-dark", {"viewport": {"width": 1200, "height": 800}, "color_scheme": "dark"}),
        ("page-phone", {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}),
    ],
)
def test_it_looks_right(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    served = Served(DEMO, tmp_path)
    try:
        page = open_page(browser, served, **options)
        page.click("#examples button:nth-child(1)")
        page.wait_for_selector("#box img")
        assert ask(page, page.input_value("#box textarea")) == "Green."
        ask(page, "what shape is in the image?")
        page.mouse.move(0, 0)
        page.evaluate("document.activeElement.blur(), window.scrollTo(0, 0)")
        page.wait_for_timeout(500)
        wide, seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide <= seen, "something is cut at the right"
        target = Path(os.environ.get("GLANCE_SCREENSHOTS", tmp_path))
        target.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=target / f"{name}.png", full_page=True)
        page.context.close()
    finally:
        served.close()
