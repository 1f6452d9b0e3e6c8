"""A run's files damaged in ways that JSON and Parquet still read: one line that names the file, within bounds of memory."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faults import at_most
from made_results import Results

from pipeline.core import PipelineError
from pipeline.report.answers_file import AnswersFile
from pipeline.report.page import write_report
from pipeline.report.table import read_metrics

SFT = "results/sft/predictions.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Results(tmp_path_factory.mktemp("whole"))
    made.demo()
    made.metrics("extract", images=8, cache_mb=1.5)
    made.metrics("tokenize", heldout={"rows": 1, "tokens": 2})
    return made.folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of its own, in which the test is."""
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def refused(file: str) -> str:
    with at_most(20), pytest.raises(PipelineError) as caught:
        write_report(Path("report.html"), [])
    assert file in caught.value.line()
    assert not Path("report.html").exists()
    return caught.value.line()


@pytest.mark.parametrize(
    ("file", "keys", "value"),
    [
        ("metrics/sft.json", ("accuracy",), "0.9"),
        ("metrics/sft.json", ("loss",), {"a": 1}),
        ("metrics/tokenize.json", ("heldout", "rows"), None),
        ("metrics/tokenize.json", ("heldout",), 1.5),
        ("metrics/extract.json", ("cache_mb",), []),
        ("results/sft/scores.json", ("types",), ["what is"]),
        ("results/sft/scores.json", ("types", "what color", "questions"), None),
        ("results/sft/scores.json", ("types", "what color", "mean"), [1]),
        ("results/sft/scores.json", ("turns",), {"first": {}}),
        ("results/sft/scores.json", ("exact", "low"), "x"),
        ("results/sft/scores.json", ("warnings",), 3),
    ],
)
def test_a_value_of_another_type_is_named(folder: Path, file: str, keys: tuple[str, ...], value: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))
    assert ".".join(keys) in refused(file)


def test_the_table_names_the_figure_that_is_missing(folder: Path) -> None:
    path = folder / "metrics/sft.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": None}))
    with pytest.raises(PipelineError, match=r"sft.json: has no accuracy -> dvc repro"):
        read_metrics(Path("metrics"))


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", [SFT, "results/sft/scores.json", "results/sft/history.csv", "metrics/sft.json"])
@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"[" * 200_000), _as_folder])
def test_a_file_that_is_none_is_named(folder: Path, file: str, damage: Callable[[Path], Any]) -> None:
    damage(folder / file)
    refused(file)


def _answers(folder: Path, **columns: pa.Array) -> None:
    """The answers again, so many rows as the given columns have, written as small as they are."""
    path = folder / SFT
    table, rows = pq.read_table(path), len(next(iter(columns.values())))
    one = {name: pa.array([table[name][0].as_py()] * rows, table[name].type) for name in table.column_names}
    os.chmod(path, 0o644)
    pq.write_table(pa.table(one | columns), path, store_schema=False, dictionary_pagesize_limit=1 << 30, compression="zstd")


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("exact", pa.array(["1"] * 3)),
        ("answer", pa.array([1, 2, 3])),
        ("answer", pa.array(["a", None, "b"])),
        ("images", pa.array([["a"], [None], ["b"]])),
        ("log_likelihood", pa.array([0.5, 0.5, 0.5], pa.float32())),
        ("turn", pa.nulls(3)),
    ],
)
def test_answers_of_another_type_are_named(folder: Path, name: str, column: pa.Array) -> None:
    _answers(folder, **{name: column})
    assert name in refused(SFT)


def test_a_text_in_every_row_takes_no_memory(folder: Path) -> None:
    big = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1024, np.int32)), pa.array(["x" * (1 << 20)]))
    _answers(folder, question=big)
    assert (folder / SFT).stat().st_size < 1 << 20
    with (folder / SFT).open("rb") as file, pytest.raises(PipelineError, match=r"unpacks to more than|not a stage's answers"):
        list(AnswersFile(file, where=SFT).batches(["question"]))


def test_rows_that_take_less_than_a_bit_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    pq.write_table(pa.table({"exact": pa.array(np.ones(20_000_000, np.float32))}), path)
    with path.open("rb") as file, pytest.raises(PipelineError, match="20,000,000 rows in"):
        AnswersFile(file, where="predictions.parquet")
