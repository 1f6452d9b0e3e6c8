"""A file that cannot be written is told as such; what fails while it is written, as what it is."""

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from pipeline.core import fork_process, machine, verify
from pipeline.core.errors import PipelineError
from pipeline.core.files import publish, publish_folder, temporary_name, write_json, writing
from pipeline.minimind.pth import write_pth
from pipeline.text.token_table import SCHEMA, write_tokens

SPEC = {"tokens": 3}


@contextmanager
def no_larger_than(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: the disk that is full for what it writes from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("publishing", [publish, publish_folder])
def test_an_error_of_something_else_is_not_blamed_on_the_file(publishing: object, tmp_path: Path) -> None:
    reset = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ConnectionResetError) as caught, publishing(tmp_path / "a"):  # type: ignore[operator]
        raise reset
    assert caught.value is reset
    with pytest.raises(FileNotFoundError, match="elsewhere"), publishing(tmp_path / "a"):  # type: ignore[operator]
        (tmp_path / "elsewhere").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_what_names_the_temporary_file_is_told_of_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with publish(tmp_path / "a") as file:
            file.unlink()
            file.mkdir()
            file.open("wb")

    with pytest.raises(PipelineError, match=r"/a: cannot be written: Is a directory") as caught:
        write()
    assert ".tmp" not in caught.value.line()
    (tmp_path / "b").write_text("")
    with pytest.raises(PipelineError, match=r"b/c: cannot be written: File exists"), publish(tmp_path / "b" / "c"):
        pass
    assert (
        "data/tokens/refused.jsonl: full"
        in PipelineError("full", where=f"data/{temporary_name(Path('tokens'))}/refused.jsonl").line()
    )


def _save_text(path: Path) -> None:
    write_json(path, {"x": "y" * 5000})


def _save_tensors(path: Path) -> None:
    with publish(path) as temporary, writing(path):
        save_file({"x": torch.zeros(5000)}, temporary)


def _save_pth(path: Path) -> None:
    write_pth(path, {"x": torch.zeros(5000)})


def _save_tokens(path: Path) -> None:
    row = {"ids": list(range(3000)), "spans": [1, 2], "image_start": [], "image_sha256": [], "image_name": [], "where": "x"}
    write_tokens(path, [pa.RecordBatch.from_pylist([row], schema=SCHEMA)], SPEC)


@pytest.mark.parametrize("save", [_save_text, _save_tensors, _save_pth, _save_tokens])
def test_a_file_for_which_there_is_no_room_is_one_line_and_leaves_nothing(save: object, tmp_path: Path) -> None:
    with (
        no_larger_than(4096),
        pytest.raises(PipelineError, match=r"/a: cannot be written: .*(File too large|unexpected pos)") as caught,
    ):
        save(tmp_path / "a")  # type: ignore[operator]
    assert len(caught.value.line().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_rows_that_fail_while_tokens_are_written_are_not_the_tokens_fault(tmp_path: Path) -> None:
    def batches() -> Iterator[pa.RecordBatch]:
        raise OSError(errno.EIO, "Input/output error", "data/rows.jsonl")
        yield

    with pytest.raises(OSError, match=r"rows\.jsonl"):
        write_tokens(tmp_path / "a", batches(), SPEC)


def test_two_that_publish_one_folder_at_once_leave_one_of_them_whole(tmp_path: Path) -> None:
    """What stands there is renamed away as a whole, so that neither deletes files of the other's."""

    def work(mark: str) -> None:
        for _ in range(20):
            with publish_folder(tmp_path / "out") as temporary:
                for name in "abcdef":
                    (temporary / name).write_text(mark)

    children = [fork_process(partial(work, mark)) for mark in "12"]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    verify(tmp_path / "out", remedy="")
    assert len({path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix != ".json"}) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_place_of_a_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(PipelineError, match="out: cannot be written"), publish_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("a")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with publish_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("before")

    plain = os.rename

    def refuse(source: object, target: object) -> None:
        if str(target).endswith("/out") and str(source).endswith(f"{os.getpid()}@{machine()}.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        plain(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PipelineError, match="out: cannot be written"), publish_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("after")
    assert (tmp_path / "out/a").read_text() == "before"
    assert os.listdir(tmp_path) == ["out"]
