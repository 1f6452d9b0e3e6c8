"""The page of `python -m pipeline.report --html`: what it tells, that it needs nothing else, that no data become markup."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_results import Results, results  # noqa: F401
from typer.testing import CliRunner

from pipeline.core import PipelineError
from pipeline.report.command import app
from pipeline.report.page import write_report

ATTACK = "</script></dd><script>alert(1)</script><img src=x onerror=alert(1)>'\"&{{7*7}}"


class Page(HTMLParser):
    """Elements, the text of each by its innermost element, and the charts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._open = ""
        self.feed(self.source)
        self.charts: dict[str, Any] = json.loads(self.scripts[0])
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open = ""
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts[-1] += data
        elif self._open != "style":
            self.text += data

    def cards(self) -> list[dict[str, str | None]]:
        """Of the gallery."""
        return [attributes for tag, attributes in self.tags if tag == "article" and "data-is" in attributes]


def page_of(*names: str) -> Page:
    write_report(Path("report.html"), names)
    return Page(Path("report.html"))


def test_the_first_screen_has_accuracy_with_its_interval_and_blind_beside(results: Results) -> None:
    results.demo()
    page = page_of()
    scores = json.loads((results.folder / "results/sft/scores.json").read_text())["metrics"]["exact"]
    top = page.text[: page.text.index("Curves")]
    assert f"80.00% exact match ({scores['low']:.2%} to {scores['high']:.2%}) of 120 questions blind 25.00%" in top
    assert "66.67% exact match" in top
    assert "not better" not in page.text


@pytest.mark.parametrize(
    ("count", "wrong_every", "said"), [(40, 5, "only 40 questions"), (120, 1, "not better than blind"), (120, 5, "")]
)
def test_what_a_figure_does_not_mean_is_said_on_the_first_screen(results: Results, count: int, wrong_every: int, said: str) -> None:
    results.write("sft", results.rows(count, wrong_every=wrong_every))
    page = page_of()
    top = page.text[: page.text.index("Curves")]
    assert said in top
    assert bool(said) == ("only" in top or "better" in top)
    assert "after pretrain – exact match no figures: the stage has not run" in top


def test_a_run_that_has_diverged_is_called_so(results: Results) -> None:
    results.write("pretrain", results.rows(), diverged=True, loss=None)
    assert "has diverged and left no model: lower pretrain.lr" in page_of().text


def test_results_of_before_answers_were_kept_still_have_a_page(results: Results) -> None:
    results.demo()
    for stage in ("pretrain", "sft"):
        for name in ("predictions.parquet", "scores.json"):
            (results.folder / "results" / stage / name).unlink()
    page = page_of()
    assert "answers were not kept" in page.text
    assert page.cards() == []
    assert "80.00%" in page.text


def test_each_stage_has_panels_of_its_own_smoothed_and_bounded(results: Results) -> None:
    results.demo()
    page = page_of()
    titles = [spec["title"] for spec in page.charts.values()]
    assert titles.count("Training loss (log scale)") == 2
    assert titles.count("Held-out loss (log scale)") == 1
    assert titles.count("Learning rate") == 2
    loss = page.charts["chart0"]
    assert loss["layer"][1]["transform"][0]["window"][0]["op"] == "mean"
    assert loss["data"]["values"][0]["y"] == pytest.approx(3.01, rel=1e-4)


def test_answers_on_the_way_are_shown_by_step(results: Results) -> None:
    results.demo()
    page = page_of()
    section = page.text[page.text.index("Answers on the way") : page.text.index("Question types")]
    assert re.search(r"sft What color is it\? ?reference ?Red\. ?10 ?Hm\..*300 ?Hm\.", section)
    assert re.search(r"Is there a circle\? ?reference ?Yes\. ?10 ?at 9.*300 ?Yes\.", section)
    assert 6 <= section.count("Hm.") <= 8, "a few of thirty"
    assert "pretrain" not in section, "which was not asked on the way"
    (results.folder / "results/sft/samples.json").write_text('{"questions": [], "measured": [1]}')
    assert "What color" not in page_of().text.partition("Question types")[0].partition("Curves")[2]


def test_groups_are_told_by_the_metric_that_fits_and_by_source(results: Results) -> None:
    rows = results.rows()
    for number, row in enumerate(rows):
        row |= {"reference": "one two three " * 4, "answer": "one two three", "source": f"{number % 2}.jsonl"}
    results.write("sft", rows)
    page = page_of()
    assert "Sources" in page.text
    assert "Points: word F1 with its interval" in page.text
    assert "exact match" in page.text


def test_a_curve_with_infinite_losses_is_drawn_with_gaps(results: Results) -> None:
    results.write("sft", results.rows())
    (results.folder / "results/sft/history.csv").write_text("step,epoch,loss,lr,grad_norm\n0,0,2.0,1e-3,1\n1,0,nan,1e-3,inf\n")
    values = page_of().charts["chart0"]["data"]["values"]
    assert [value["y"] for value in values] == [2.0, None]


def test_the_gallery_shows_wrong_and_right_answers_worst_first_with_their_pictures(results: Results) -> None:
    results.demo()
    page = page_of()
    cards = page.cards()
    kinds = [(card["data-is"] or "").split()[0] for card in cards]
    assert kinds.count("wrong") + kinds.count("right") == len(cards) <= 60
    assert set(kinds) == {"wrong", "right"}
    assert {card["data-kind"] for card in cards} == {"what color", "is there"}
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(cards) + 2, "two of answers on the way"
    assert all(source.startswith("data:image/jpeg;base64,") for source in pictures)
    places = [page.text.index(f"data/rows.jsonl:{row} ·") for row in (116, 111, 106) if f"data/rows.jsonl:{row} ·" in page.text]
    assert places == sorted(places)
    assert len(places) >= 2


def test_a_picture_that_is_gone_costs_its_place_only(results: Results) -> None:
    results.demo()
    (results.folder / "data/pictures/0.png").unlink()
    (results.folder / "data/pictures/1.png").write_bytes(b"no picture")
    page = page_of()
    assert "Pictures are missing: data/pictures: '0.png': no such image" in page.text or "'1.png'" in page.text
    assert any(tag == "img" for tag, _ in page.tags)


def test_no_data_become_markup_or_script_and_nothing_is_loaded(results: Results) -> None:
    results.demo()
    rows = results.rows()
    for row in rows[:12]:
        row |= {"question": ATTACK, "answer": ATTACK, "reference": ATTACK[1:], "blind": ATTACK, "where": ATTACK + row["where"]}
        row["images"] = ["<b>'\"&.png"]
    results.write("sft", rows)
    results.set("data.sft.records='</td><script>alert(2)</script>'")
    page = page_of()
    assert "<script>alert" not in page.source
    assert "&lt;script&gt;alert(1)" in page.source
    assert "49" not in [part.split("'\"&")[-1][:2] for part in page.text.split("onerror")]
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 5
    assert not {"b", "link", "iframe", "object", "base"} & set(tags)
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert all((attributes.get(name) or "data:").startswith("data:") for name in ("src", "href")), tag
    policy = next(attributes["content"] or "" for tag, attributes in page.tags if "http-equiv" in attributes)
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "'unsafe-inline'" not in policy[policy.index("script-src") :]
    for script in page.scripts[1:]:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


def test_the_same_results_give_the_same_bytes(results: Results) -> None:
    results.demo()
    write_report(Path("one.html"), [])
    write_report(Path("two.html"), [])
    assert Path("one.html").read_bytes() == Path("two.html").read_bytes()
    assert Path("one.html").stat().st_size < 5_000_000


def test_the_command_writes_it_and_without_html_prints_the_table(results: Results) -> None:
    results.demo()
    run = CliRunner().invoke(app, ["--html", "report.html"])
    assert run.exit_code == 0, run.output
    assert "report.html: " in run.output
    assert Path("report.html").exists()
    results.metrics("extract", images=8, cache_mb=1.5, seconds=2.0, peak_memory_gb=0.5)
    table = CliRunner().invoke(app, [])
    assert "after SFT" in table.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--html", "report.txt"], "expected a name that ends in .html"),
        (["some-experiment"], "add --html report.html"),
        (["--html", "report.html"], "no figures yet"),
    ],
)
def test_mistakes_are_one_line(results: Results, arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    (results.folder / "metrics").mkdir()
    run = CliRunner().invoke(app, arguments)
    assert run.exit_code != 0
    error = run.stderr or capfd.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "damaged", ["results/sft/predictions.parquet", "results/sft/scores.json", "results/sft/history.csv", "metrics/sft.json"]
)
def test_a_damaged_file_is_one_line_that_names_it(results: Results, damaged: str) -> None:
    results.demo()
    path = results.folder / damaged
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 1] + b"\xff")
    with pytest.raises(PipelineError) as caught:
        page_of()
    assert damaged in caught.value.line()


def test_a_missing_drawing_library_is_named(results: Results) -> None:
    results.demo()
    (results.folder / ".dvc/plots/offline.html").unlink()
    with pytest.raises(PipelineError, match=re.escape(".dvc/plots/offline.html")):
        page_of()
