"""Data sets as params.yaml names them: every stage sees, and refuses, the same rows."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from conftest import ROWS, World, read_records, row

from pipeline.core.errors import PipelineError
from pipeline.params.reading import load
from pipeline.params.schema import Data, Dataset
from pipeline.records.datasets import good_rows, open_dataset


def dataset(world: World, rows: list[Any], **options: Any) -> Dataset:
    path = world.folder / "datasets.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return Dataset(**{"records": str(path), "images": str(world.images.path), **options})


def data(**options: Any) -> Data:
    return load(Path(__file__).parents[2] / "params.yaml").data.model_copy(update=options)


def test_rows_are_those_of_the_records_file_and_pictures_those_of_its_root(world: World) -> None:
    source = open_dataset(dataset(world, ROWS))
    with good_rows(source, data()) as records:
        found = list(records)
    assert found == list(read_records(world.folder / "datasets.jsonl"))
    assert pickle.loads(pickle.dumps(source.images)).read("1.png") == world.images.read("1.png")


def test_a_missing_image_folder_is_told_before_any_row_is_read(world: World) -> None:
    with pytest.raises(PipelineError, match="no such folder or zip"):
        open_dataset(dataset(world, ROWS, images=str(world.folder / "nowhere")))


def test_a_bad_row_stops_a_stage_and_all_are_counted(world: World) -> None:
    source = open_dataset(dataset(world, [ROWS[0], "{torn", ROWS[1], row("<image>?", "Yes.")]))
    with pytest.raises(PipelineError, match="2 of 4 rows are bad") as caught, good_rows(source, data()) as records:
        assert len(list(records)) == 1
    assert "datasets.jsonl:2" in caught.value.line()
    assert "datasets.jsonl:4" in caught.value.line()
    assert "data.on_error" in caught.value.line()


def test_skipped_rows_are_listed_and_more_than_allowed_still_stops(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_dataset(dataset(world, [*ROWS[:3], "{torn"]))
    table = tmp_path / "rejected.csv"
    with good_rows(source, data(on_error="skip", max_bad_share=0.25), rejected=table) as records:
        assert len(list(records)) == 3
    assert "1 of 4 rows left out" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == 2
    with (
        pytest.raises(PipelineError, match="max_bad_share"),
        good_rows(source, data(on_error="skip", max_bad_share=0.2)) as records,
    ):
        list(records)
