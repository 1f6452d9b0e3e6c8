"""Experiments side by side: read from git and DVC's cache while the work tree says something else, and stays as it is."""

import io
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from dvc.repo import Repo
from made_results import Results, results  # noqa: F401
from test_page import page_of

from pipeline.core import PipelineError
from pipeline.report.answers import Answers, worst_first
from pipeline.report.experiment import Experiment
from pipeline.report.gallery import PICTURES
from pipeline.report.page import MOST


def read(stage: str, *kinds: str) -> Answers:
    return Answers(io.BytesIO(Path(f"results/{stage}/predictions.parquet").read_bytes()), kinds, where=stage)


def git(*arguments: str) -> str:
    identity = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"), "x")
    made = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True, env=os.environ | identity)
    return made.stdout.strip()


@pytest.fixture(name="two_runs")
def make_two_runs(results: Results) -> Results:
    """Tags one and two; the second has other answers to some questions and another learning rate."""
    git("init", "-q")
    (results.folder / "dvc.yaml").unlink()  # its stages would own the results
    Repo.init(force=True).close()
    results.link_library()
    results.demo()
    for tag in ("one", "two"):
        if tag == "two":
            shutil.rmtree("results")
            results.set("pretrain.lr=0.004")
            results.write("pretrain", results.rows(wrong_every=4))
            results.write("sft", results.rows(wrong_every=7))
        with Repo() as repo:
            repo.add("results")
        git("add", "-A", "--", "metrics", "params.yaml", "results.dvc")
        git("commit", "-qm", tag)
        git("tag", tag)
    (results.folder / "dvc.yaml").write_text("stages: {}\n")
    return results


@pytest.mark.usefixtures("two_runs")
def test_two_experiments_stand_side_by_side_and_the_work_tree_is_left_alone() -> None:
    shutil.rmtree("results")
    Path("params.yaml").write_text("other: work\n")
    before, head = git("status", "--porcelain"), git("rev-parse", "HEAD")
    page = page_of("one", "two")
    Path("report.html").unlink()
    assert (git("status", "--porcelain"), git("rev-parse", "HEAD")) == (before, head)
    assert not Path("results").exists()
    top = page.text[: page.text.index("Curves")]
    assert "80.00% exact match" in top
    assert "85.00% exact match" in top
    assert git("rev-parse", "--short=12", "one") in top
    loss = page.charts["chart0"]
    assert {value["run"] for value in loss["data"]["values"]} == {"one", "two"}
    # wrong are the multiples of 5 in one, of 7 in two; of 120 numbers, 4 are both
    assert "of 120 shared questions 20 are right only with two, 14 wrong only with it" in page.text
    flipped = [card for card in page.cards() if "flipped" in (card["data-is"] or "")]
    assert 0 < len(flipped) <= 20
    assert "pretrain.lr 0.001 0.004 0.004" in page.text


@pytest.mark.usefixtures("two_runs")
def test_an_experiment_whose_results_are_not_in_the_cache_is_one_line() -> None:
    shutil.rmtree("results")
    shutil.rmtree(".dvc/cache")
    with pytest.raises(PipelineError) as caught:
        page_of("one")
    assert "of one" in caught.value.line()
    assert "dvc" in caught.value.remedy


@pytest.mark.usefixtures("two_runs")
@pytest.mark.parametrize("name", ["no-such-experiment", "--upload-pack=x", ""])
def test_a_name_that_nobody_knows_is_one_line(name: str) -> None:
    if not name:
        assert Experiment(name).name == "work tree"
        return
    with pytest.raises(PipelineError, match="no such experiment"):
        Experiment(name)


@pytest.mark.usefixtures("results")
def test_more_experiments_than_can_be_told_apart_are_refused() -> None:
    with pytest.raises(PipelineError, match=f"at most {MOST}"):
        page_of(*map(str, range(MOST + 1)))


def test_questions_are_matched_by_what_they_ask_not_by_their_place(results: Results) -> None:
    rows = results.rows(40)
    results.write("pretrain", rows)
    results.write("sft", [*reversed(rows[5:]), {**rows[0], "question": "Another one?"}])
    found = read("pretrain").matched(read("sft"))
    assert found.tolist() == [-1] * 5 + list(range(34, -1, -1))
    assert read("pretrain").matched(read("pretrain")).tolist() == list(range(40))


def test_a_large_file_shows_no_more_than_its_worst_and_counts_all(results: Results) -> None:
    results.demo()
    rows = results.rows(30_000, wrong_every=3)
    results.write_answers("sft", rows)
    answers = read("sft", "is there", "what color")
    assert len(answers) == 30_000
    wrong = np.flatnonzero(~answers.right)
    assert len(wrong) == 10_000
    chosen = worst_first(answers, wrong, 10)
    assert len(chosen) == 10
    assert set(chosen) <= set(wrong[-30:].tolist())
    assert sum(map(sum, answers.confusion().counts)) == 30_000
    assert [row["where"] for row in answers.rows([29_999, 3])] == ["data/rows.jsonl:30000", "data/rows.jsonl:4"]
    assert len([tag for tag, _ in page_of().tags if tag == "img"]) <= PICTURES


def test_a_revision_that_cannot_be_looked_into_is_one_line() -> None:
    class Broken:
        def open(self, *_: object) -> None:
            raise FileNotFoundError

        def exists(self, _: str) -> bool:
            raise OSError("object 12ab is corrupt")

    run = Experiment()
    run.name, run._files = "abc", Broken()
    with pytest.raises(PipelineError, match=r"metrics/sft\.json of abc: cannot be looked up: object 12ab is corrupt"):
        run.json("metrics/sft.json")
