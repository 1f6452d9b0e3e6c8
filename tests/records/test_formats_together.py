"""What holds for all formats: pictures within rows, globs, mixing, splitting, and what bad rows cost."""

import csv
import json
import multiprocessing
import pickle
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_examples import Png, image_folder, pack, saved, seen, talk, url, write

from pipeline.core.errors import PipelineError
from pipeline.records.formats import BadRow, Digests, RowPolicy, SourceSpec, Split, open_source
from pipeline.records.formats.split import is_held_out
from pipeline.records.images import ImageError, digest
from pipeline.records.record import Record


@pytest.fixture
def images(tmp_path: Path, png: Png) -> Path:
    return image_folder(tmp_path, png)


# What holds for all of them.


def test_an_array_gives_what_its_rows_give_as_lines_whatever_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "é€😀" * (i % 7) + "x", "image": f"{i}.png", "n": [i, {"deep": -1.5e3}]} for i in range(200)]
    lines = write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    expected = [(row.images, row.turns) for row in open_source(SourceSpec(str(lines))).records() if isinstance(row, Record)]
    for window in (1, 7, 100, 1 << 20):
        monkeypatch.setattr("pipeline.records.formats.array.CHUNK", window)
        found = open_source(SourceSpec(str(tmp_path / "rows.json"))).records()
        assert [(row.images, row.turns) for row in found if isinstance(row, Record)] == expected


@pytest.mark.parametrize("container", ["jsonl", "json", "parquet", "tar", "saved"])
def test_pictures_within_rows_are_read_pickled_and_in_forked_workers(tmp_path: Path, png: Png, container: str) -> None:
    rows = [{"text": str(i), "image": url(png(i))} for i in range(40)]
    path = tmp_path / "rows"
    match container:
        case "jsonl":
            write(path, *rows)
        case "json":
            path.write_text("\ufeff" + json.dumps(rows))
        case "parquet":
            pq.write_table(
                pa.table({"text": [str(i) for i in range(40)], "image": [png(i) for i in range(40)]}), path, row_group_size=25
            )
        case "tar":
            pack(path, [part for i in range(40) for part in ((f"{i}.png", png(i)), (f"{i}.txt", str(i).encode()))])
        case _:
            saved(path, png)
    source = open_source(SourceSpec(str(path)))
    names = [name for row in source.records() if isinstance(row, Record) for name in row.images]
    random.Random(0).shuffle(names)
    expected = [digest(source.images.read(name)) for name in names]
    assert sorted(expected) == sorted(digest(png(i)) for i in range(len(names)))
    again = pickle.loads(pickle.dumps(source.images))
    assert [digest(again.read(name)) for name in names] == expected
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert [digest(data) for data in pool.map(source.images.read, names)] == expected


def test_globs_lists_and_the_limit(tmp_path: Path) -> None:
    for i in (10, 2, 1):
        write(tmp_path / f"part-{i}.jsonl", *({"text": f"{i}.{row}", "image": "a"} for row in range(2)))

    def texts(records: str | tuple[str, ...], limit: int = 0) -> list[Any]:
        rows = open_source(SourceSpec(records, limit=limit)).records()
        return [row.turns[1].parts[0] for row in rows if isinstance(row, Record)]

    assert texts(f"{tmp_path}/part-*.jsonl") == ["1.0", "1.1", "10.0", "10.1", "2.0", "2.1"]
    assert texts((f"{tmp_path}/part-2.jsonl", f"{tmp_path}/part-1*.jsonl"), limit=3) == ["2.0", "2.1", "1.0"]
    (tmp_path / "part-10.jsonl").write_text("broken, and behind the limit\n")
    assert texts(f"{tmp_path}/part-1.jsonl", limit=2) == ["1.0", "1.1"]


def test_pictures_without_a_place_are_refused_or_stand_first(tmp_path: Path, images: Path, png: Png) -> None:
    said = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "This."}]
    path = str(write(tmp_path / "rows.jsonl", {"messages": said, "images": ["a.png", "b.png"]}))
    (bad,) = open_source(SourceSpec(path, str(images))).records()
    assert isinstance(bad, BadRow)
    assert "0 <image> placeholders for 2 images" in bad.line()
    assert seen(SourceSpec(path, str(images), unplaced="first")) == [(talk((0, 1, "\nWhat is it?"), "This."), [png(0), png(1)])]


def test_a_mixture_takes_each_row_as_often_as_its_weight_says(tmp_path: Path, images: Path, png: Png) -> None:
    common = str(write(tmp_path / "common.jsonl", *({"text": f"common {i}", "image": "a.png"} for i in range(400))))
    rare = str(write(tmp_path / "rare.jsonl", {"text": "rare", "image": "b.png"}))

    def drawn(seed: int) -> list[Record]:
        mixed = open_source([SourceSpec(common, str(images), weight=0.25), SourceSpec(rare, str(images), weight=3)], seed=seed)
        rows = [row for row in mixed.records() if isinstance(row, Record)]
        assert mixed.images.read(rows[0].images[0]) == png(0)
        assert mixed.images.read(rows[-1].images[0]) == png(1)
        return rows

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert first == again != other
    assert [row.turns[1].parts for row in first[-3:]] == [("rare",)] * 3
    assert 70 < len(first) - 3 < 130, "a quarter of 400"
    assert len({row.where for row in first[:-3]}) == len(first) - 3, "a fraction takes no row twice"


def test_a_split_keeps_every_picture_on_one_side_whatever_else_there_is(tmp_path: Path, png: Png) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(60):
        for name in (f"{i}.png", f"copy-of-{i}.png"):
            (pictures / name).write_bytes(png(i))
    rows: list[Any] = [{"text": "x", "image": f"{prefix}{i}.png"} for i in range(60) for prefix in ("", "copy-of-")]
    said = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "both"}]
    rows += [{"messages": said, "images": [f"{i}.png", f"{i + 1}.png"]} for i in range(0, 60, 2)]
    rows += [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "text"}]} for i in range(60)]
    source = open_source(SourceSpec(str(write(tmp_path / "rows.jsonl", *rows)), str(pictures)))

    split = Split(Digests(source.images), share=0.3, seed=0)
    sides: dict[str, list[Record]] = {}
    for side in ("train", "heldout"):
        sides[side] = [row for row in split.records(source.records(), side) if isinstance(row, Record)]
        assert sum(split.counts.values()) == len(rows)
    assert split.counts == {"train": len(sides["train"]), "heldout": len(sides["heldout"]), "neither": split.counts["neither"]}
    assert split.counts["neither"] > 0
    assert len(split.neither) == min(10, split.counts["neither"])
    shown = {side: {digest(source.images.read(name)) for row in found for name in row.images} for side, found in sides.items()}
    assert not shown["train"] & shown["heldout"]
    assert 6 < len(shown["heldout"]) < 30, "0.3 of 60 pictures"
    assert all(is_held_out(key, share=0.3, seed=0) for key in shown["heldout"])
    assert any(not row.images for row in sides["heldout"])


def test_a_picture_that_cannot_be_read_is_a_bad_row_of_the_split(tmp_path: Path, images: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "x", "image": "missing.png"})
    source = open_source(SourceSpec(str(path), str(images)))
    (bad,) = Split(Digests(source.images), share=0.5, seed=0).records(source.records(), "train")
    assert isinstance(bad, BadRow)
    assert bad.where == f"{path}:1"
    assert "missing.png" in bad.reason


def stream(good: int, bad: int) -> list[Record | BadRow]:
    rows: list[Record | BadRow] = [Record(f"f:{i}", (), ()) for i in range(good)]
    return [*rows[:1], *(BadRow("f", f"bad {i}", "torn") for i in range(bad)), *rows[1:]]


def test_stop_keeps_nothing_behind_a_bad_row_and_tells_of_all(tmp_path: Path) -> None:
    kept = []
    with RowPolicy("stop", 1.0, table=tmp_path / "rejected.csv") as policy:  # noqa: SIM117 - the table outlives the error
        with pytest.raises(PipelineError, match=r"12 of 32 rows are bad \(37.5%\)") as caught:
            kept += list(policy.keep(stream(20, 12)))
    assert kept == []
    line = caught.value.line()
    assert all(f"f:bad {i} (torn)" in line for i in range(10))
    assert "bad 10" not in line
    with (tmp_path / "rejected.csv").open() as file:
        assert [row["row"] for row in csv.DictReader(file)] == [f"bad {i}" for i in range(12)]


def test_skip_lists_bad_rows_up_to_a_share(tmp_path: Path) -> None:
    with RowPolicy("skip", 0.1, table=tmp_path / "rejected.csv") as policy:
        assert len(list(policy.keep(stream(18, 2)))) == 18
        policy.finish(where="f")
    assert (policy.good, policy.bad) == (18, 2)
    assert (tmp_path / "rejected.csv").read_text().splitlines() == [
        "file,row,rows,reason,remedy",
        "f,bad 0,1,torn,mend or remove the row",
        "f,bad 1,1,torn,mend or remove the row",
    ]
    policy = RowPolicy("skip", 0.1)
    assert len(list(policy.keep(stream(17, 2)))) == 17
    with pytest.raises(PipelineError, match="2 of 19 rows are bad"):
        policy.finish(where="f")


@pytest.mark.parametrize(("rows", "said"), [([], "no rows"), ([BadRow("f", 1, "torn")], "1 of 1 rows are bad")])
def test_a_source_without_a_good_row_is_an_error_however_much_is_allowed(rows: list[BadRow], said: str) -> None:
    policy = RowPolicy("skip", 1.0)
    assert list(policy.keep(rows)) == []
    with pytest.raises(PipelineError, match=said):
        policy.finish(where="f")


def test_a_file_without_an_end_stops_under_every_policy() -> None:
    policy = RowPolicy("skip", 1.0)
    with pytest.raises(PipelineError, match="f:9: the rest is missing"):
        list(policy.keep([*stream(5, 0), BadRow("f", 9, "the rest is missing", ends_file=True), *stream(5, 0)]))


def test_a_name_that_reads_as_a_place_in_the_file_of_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, {"text": "x", "image": f"{path}#0/0"})
    (bad,) = open_source(SourceSpec(str(path))).records()
    assert isinstance(bad, BadRow)
    assert "reads as a place" in bad.reason


def test_a_row_that_is_no_longer_there_is_an_image_error(tmp_path: Path, png: Png) -> None:
    path = write(tmp_path / "rows.jsonl", {"text": "x", "image": url(png(0))})
    source = open_source(SourceSpec(str(path)))
    (row,) = source.records()
    assert isinstance(row, Record)
    write(path, {"text": "x"})
    with pytest.raises(ImageError, match="no such image any more"):
        source.images.read(row.images[0])
