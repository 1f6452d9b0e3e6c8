"""The page of `python -m pipeline.check --html`: it needs nothing else, and nothing in the data becomes markup."""

import base64
import io
from html.parser import HTMLParser

from checked import Png, Project, project  # noqa: F401
from conftest import PATCHES, ROWS, row
from PIL import Image


class Page(HTMLParser):
    """Elements with their attributes, and the text of those of a class."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._kind = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._kind = dict(attrs).get("class") or ""

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._kind = ""

    def handle_data(self, data: str) -> None:
        self.texts.append((self._kind, data))


def test_the_page_needs_nothing_else_and_data_cannot_become_markup(project: Project, png: Png) -> None:
    attack = "</span></pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    (project.folder / "images" / "<b>'\"&.png").write_bytes(png(7))
    project.write(
        "<i>rows",
        row(f"<image>{attack}", attack, "<b>'\"&.png"),
        row("<image>x", "y", f"{attack}.png".replace("/", "")),
        {"messages": [{"role": attack, "content": "x"}]},
    )
    assert project.run("<i>rows.jsonl", "--images", "images", "--html", "page.html").exit_code == 3
    text = (project.folder / "page.html").read_text()
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "b", "i", "link", "iframe", "object"}
    assert "&lt;script&gt;alert(1)" in text
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all((attributes.get(name) or "data:").startswith("data:") for name in ("src", "href")), tag
    assert "default-src 'none'" in next(a["content"] or "" for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "http" not in text.replace("http-equiv", "")
    assert text.count("<img ") == 1


def test_the_page_draws_rows_as_the_model_sees_them(project: Project) -> None:
    run = project.run("rows.jsonl", "--images", "images", "--html", "page.html")
    assert run.exit_code == 0, run.output
    page = Page((project.folder / "page.html").read_text())
    answers = {text for kind, text in page.texts if kind == "text answer"}
    assert answers >= {"It is a red circle.", "A square.", "Blue.", "Yes."}
    assert not any("What" in text for text in answers)
    assert {text for kind, text in page.texts if kind == "image"} == {f"[{PATCHES} image tokens]"} | {"a picture's tokens"}
    assert "<|im_end|>" in {text for kind, text in page.texts if kind == "control answer"}
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == sum(len(content["images"]) for content in ROWS)  # type: ignore[arg-type]
    data = base64.b64decode((pictures[0]["src"] or "").removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(data)).size == (40, 32)
    assert [tag for tag, _ in page.tags].count("svg") == 1


def test_a_long_row_and_many_pictures_are_drawn_in_part_and_say_so(project: Project) -> None:
    project.write("rows", row("<image>" * 9 + "A square. " * 800, "y", *["0.png"] * 9))
    project.set(tokenize__max_tokens=20_000)
    assert project.run("rows.jsonl", "--images", "images", "--html", "page.html").exit_code == 0
    text = (project.folder / "page.html").read_text()
    assert text.count("<img ") == 6
    assert "3 more pictures, the first 4,000 letters" in text
    assert len(text) < 40_000
