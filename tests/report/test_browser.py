"""The page in a real browser (headless Chromium), with nothing but the file: charts are drawn and nothing is refused by its policy.

Skipped without a Chromium on PATH. With GLANCE_SCREENSHOTS=docs/report the screenshots go there, of the results of
GLANCE_REPORT and (two experiments) GLANCE_COMPARED, pages that are there already, or of made-up ones.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from made_results import Results, results  # noqa: F401
from PIL import Image
from test_experiments import make_two_runs  # noqa: F401

from pipeline.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")]
VIEWS = {"desktop": ("1100,2300",), "phone": ("500,2300",), "dark": ("1100,2300", "--force-dark-mode")}


def chromium(page: Path, *arguments: str) -> str:
    """What it prints, its log included."""
    assert CHROMIUM is not None
    fixed = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=8000",
        "--enable-logging=stderr",
    )
    made = subprocess.run(
        [CHROMIUM, *fixed, *arguments, page.resolve().as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return made.stdout + "\n" + "\n".join(line for line in made.stderr.splitlines() if ":CONSOLE" in line)


def test_charts_are_drawn_and_nothing_is_refused(results: Results) -> None:
    results.demo()
    write_report(Path("report.html"), [])
    found = chromium(Path("report.html"), "--dump-dom")
    assert found.count('<svg xmlns="http://www.w3.org/2000/svg"') == found.count('<div class="chart') >= 8
    assert "CONSOLE" not in found
    assert f">{found.count(' data-is=')} shown<" in found


@pytest.mark.parametrize("view", VIEWS)
def test_a_picture_of_it(results: Results, view: str) -> None:
    results.demo()
    write_report(Path("report.html"), [])
    take_picture(Path(os.environ.get("GLANCE_REPORT", "report.html")), f"report-{view}", view)


@pytest.mark.usefixtures("two_runs")
def test_a_picture_of_two_experiments() -> None:
    write_report(Path("report.html"), ["one", "two"])
    page = Path(os.environ.get("GLANCE_COMPARED", "report.html"))
    take_picture(page, "compared-desktop", "desktop")
    labels = re.findall(r'<g class="mark-text role-axis-label".*?</g>', chromium(page, "--dump-dom"), re.DOTALL)
    assert labels
    for axis in labels:  # a format that rounds would give neighbours the same number
        written = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", axis) if text]
        assert len(set(written)) == len(written)


def take_picture(page: Path, name: str, view: str) -> None:
    """A screenshot where GLANCE_SCREENSHOTS says, else here; of the width and the lightness it should have."""
    folder = Path(os.environ.get("GLANCE_SCREENSHOTS", ".")).absolute()
    folder.mkdir(exist_ok=True)
    shown, (size, *more) = folder / f"{name}.png", VIEWS[view]
    chromium(page, f"--window-size={size}", f"--screenshot={shown}", *more)
    with Image.open(shown) as picture:
        colours = picture.convert("RGB").quantize(64)
        assert picture.width == int(size.split(",")[0])
        corner = picture.convert("L").getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner < 64) == (view == "dark")
    colours.save(shown, optimize=True)
