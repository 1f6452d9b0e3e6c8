"""`glance report --html FILE --look`: heat maps of the gallery's answers, over its thumbnails, by the model of the work tree."""

import base64
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from made_results import Results, results  # noqa: F401
from PIL import Image
from test_chat import trained  # noqa: F401
from test_page import ATTACK, Page

from pipeline.report.page import write_report


@pytest.fixture
def looked(results: Results, trained: Path) -> Results:
    """Four questions, the first with two pictures, the third not the first of its row; and a model of the work tree."""
    rows = results.rows(4)
    rows[0]["images"] = ["0.png", "1.png"]
    rows[1] |= {"question": ATTACK, "answer": f"{ATTACK} Red."}
    rows[2]["turn"] = 1
    results.write("sft", rows)
    shutil.copytree(trained, results.folder / "models/sft")
    return results


def page_of(name: str = "report.html") -> Page:
    write_report(Path(name), [], look=True)
    return Page(Path(name))


@pytest.mark.usefixtures("looked")
def test_each_answer_has_its_words_and_a_map_of_each_over_every_picture() -> None:
    page = page_of()
    heat = json.loads(next(script for script in page.scripts[1:] if script.startswith("[")))
    shown = [attributes for tag, attributes in page.tags if tag == "button"]
    assert len(heat) == 3  # all but the later turn
    assert sum(len(card["words"]) for card in heat) == len(shown)
    assert sorted({len(card["places"]) for card in heat}) == [1, 2]
    for card in heat:
        for method in ("rollout", "gradient"):
            assert [len(maps) for maps in card[method]] == [len(card["places"])] * len(card["words"])
            for picture in (picture for maps in card[method] for picture in maps):
                with Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,")))) as image:
                    layer = np.asarray(image.convert("RGBA"))
                assert layer.shape == (4, 4, 4)
        for left, top, width, height in card["places"]:  # 40 x 30 pixels, of which the middle 30 are seen
            assert (left, top, width, height) == pytest.approx((12.5, 0, 75, 100), abs=1.5)
    assert "<script>alert" not in page.source
    write_report(Path("again.html"), [], look=True)
    assert Path("again.html").read_bytes() == Path("report.html").read_bytes()


def test_without_a_model_the_page_says_so(results: Results) -> None:
    results.write("sft", results.rows(4))
    assert "Maps are missing: no trained model here" in page_of().text


def test_a_picture_that_is_gone_costs_its_own_maps(looked: Results) -> None:
    (looked.folder / "data/pictures/3.png").unlink()
    page = page_of()
    heat = json.loads(next(script for script in page.scripts[1:] if script.startswith("[")))
    assert len(heat) == 2
