"""Pictures as people name them."""

import os
from pathlib import Path

import pytest

from pipeline.chat.paths import find_pictures, names_pictures, read_picture, require_text, show
from pipeline.core import PipelineError
from pipeline.records import ImageError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "a b.png", "it's.png", "one, two.png", "'quoted'.png", "back\\slash.png", "日本.png", "c d.png"):
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("a.png", ["a.png"]),
        ("  a.png ", ["a.png"]),
        ("'a.png'", ["a.png"]),
        ('"a b.png"', ["a b.png"]),
        ("a b.png", ["a b.png"]),
        ("a\\ b.png", ["a b.png"]),
        ("it's.png", ["it's.png"]),
        ("it\\'s.png", ["it's.png"]),
        ("one, two.png", ["one, two.png"]),
        ("'quoted'.png", ["'quoted'.png"]),
        ("back\\slash.png", ["back\\slash.png"]),
        ("~/a.png", ["HOME/a.png"]),
        ("'~/a b.png'", ["HOME/a b.png"]),
        ("file://HOME/a%20b.png", ["HOME/a b.png"]),
        ("file://localhostHOME/a.png", ["HOME/a.png"]),
        ("'file://HOME/a%20b.png'", ["HOME/a b.png"]),
        ("file://HOME/%E6%97%A5%E6%9C%AC.png", ["HOME/日本.png"]),
        ("'a b.png' 'c d.png'", ["a b.png", "c d.png"]),
        ("a.png 日本.png", ["a.png", "日本.png"]),
        ("a.png nowhere.png", ["a.png nowhere.png"]),
        ("'nowhere b.png'", ["nowhere b.png"]),
        ("'open", ["'open"]),
        ("~nobody-has-this-name/x", ["~nobody-has-this-name/x"]),
        ("", []),
    ],
)
def test_a_line_means_these_files(here: Path, typed: str, names: list[str]) -> None:
    assert find_pictures(typed.replace("HOME", str(here))) == [Path(name.replace("HOME", str(here))) for name in names]


def test_only_files_that_are_there_are_taken_for_dragged_ones(here: Path) -> None:
    assert names_pictures(f"{here}/a.png")
    assert names_pictures(f"'{here}/a b.png'")
    assert names_pictures(f"file://{here}/a.png")
    for line in ("/image a.png", "/help", "a.png?", "what is it?", f"{here}", f"{here}/nowhere.png", "/\0", ""):
        assert not names_pictures(line)


def test_what_is_no_picture_is_told_without_a_row(here: Path) -> None:
    os.mkfifo(here / "pipe")
    (here / "large.png").touch()
    os.truncate(here / "large.png", 1 << 40)
    for name in ("nowhere.png", ".", "pipe", "large.png", "a\0b", "x" * 5000, "\udcff.png"):
        with pytest.raises(ImageError) as error:
            read_picture(Path(name))
        assert error.value.line().endswith("-> give the path of a picture")
        assert "row" not in error.value.line()
        show(error.value.line()).encode()


def test_words_that_are_no_text_are_refused_in_one_line() -> None:
    assert require_text("ça va? 🦔", "the question")
    with pytest.raises(PipelineError, match="the question is not UTF-8"):
        require_text(os.fsdecode(b"what \xff?"), "the question")
