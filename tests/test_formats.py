"""Formats: each one's documented example gives the same records and picture bytes; mixing, splitting and what bad rows cost."""

import base64
import csv
import io
import json
import multiprocessing
import pickle
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from pipeline.errors import PipelineError
from pipeline.formats import BadRow, Columns, Digests, RowPolicy, SourceSpec, Split, detect, open_source
from pipeline.formats.__main__ import app
from pipeline.formats.split import is_held_out
from pipeline.images import ImageError, digest
from pipeline.records import ImageSlot, Record, Turn

Png = Callable[[int], bytes]
Seen = tuple[tuple[Turn, ...], list[bytes]]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def seen(spec: SourceSpec | list[SourceSpec]) -> list[Seen]:
    """Every row's turns with the bytes of its pictures, through the public interface."""
    source = open_source(spec)
    rows = list(source.records())
    assert not [row.line() for row in rows if isinstance(row, BadRow)]
    return [(row.turns, [source.images.read(name) for name in row.images]) for row in rows if isinstance(row, Record)]


def talk(*said: Any) -> tuple[Turn, ...]:
    """Turns in order, the user first; a picture's number stands for its slot."""
    turns = []
    for i, parts in enumerate(said):
        parts = parts if isinstance(parts, tuple) else (parts,)
        turns.append(Turn(("user", "assistant")[i % 2], tuple(ImageSlot(p) if isinstance(p, int) else p for p in parts)))
    return tuple(turns)


def url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


@pytest.fixture
def images(tmp_path: Path, png: Png) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        (folder / name).write_bytes(png(number))
    return folder


# The documented example of each format, as its project's own pages give it.


def test_minimind_v_2025_json_lines_with_several_images_parted_by_commas(tmp_path: Path, images: Path, png: Png) -> None:
    one = {
        "conversations": [
            {"role": "user", "content": "提供给定图像的简要描述。\n<image>"},
            {"role": "assistant", "content": "橄榄油是自由使用的健康成分。"},
        ],
        "image": "a.png",
    }
    two = {
        "conversations": [{"role": "user", "content": "<image>\n<image>\nSame?"}, {"role": "assistant", "content": "No."}],
        "image": "a.png, sub/c.png",
    }
    path = write(tmp_path / "pretrain_data.jsonl", one, two)
    assert detect(str(path)) == "jsonl"
    assert seen(SourceSpec(str(path), str(images))) == [
        (talk(("提供给定图像的简要描述。\n", 0), "橄榄油是自由使用的健康成分。"), [png(0)]),
        (talk((0, "\n", 1, "\nSame?"), "No."), [png(0), png(2)]),
    ]


def test_minimind_v_2026_parquet_with_bytes_lists_of_bytes_and_rows_of_text(tmp_path: Path, png: Png) -> None:
    black = io.BytesIO()
    Image.new("RGB", (8, 8)).save(black, "JPEG")
    said = [{"role": "user", "content": "<image>\nPlease describe this image."}, {"role": "assistant", "content": "A cat."}]
    text = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]
    both = [{"role": "user", "content": "<image><image>"}, {"role": "assistant", "content": "Two."}]
    one = pa.table({"conversations": [json.dumps(said), json.dumps(text)], "image_bytes": [png(0), black.getvalue()]})
    many = pa.table({"conversations": [json.dumps(both), json.dumps(text)], "image_bytes": [[png(1), png(2)], None]})
    for name, table in (("one", one), ("many", many)):
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=1)
    assert detect(str(tmp_path / "one.parquet")) == "parquet"
    files = (str(tmp_path / "one.parquet"), str(tmp_path / "many.parquet"))
    described, greeted = talk((0, "\nPlease describe this image."), "A cat."), talk("Hello.", "Hi.")
    assert seen(SourceSpec(files)) == [
        (described, [png(0)]),
        (greeted, []),
        (talk((0, 1), "Two."), [png(1), png(2)]),
        (greeted, []),
    ]


def test_llava_json_array_with_the_image_anywhere_in_the_text(tmp_path: Path, images: Path, png: Png) -> None:
    rows = [
        {
            "id": "997bb945",
            "image": "sub/c.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWrite a prompt for this image."},
                {"from": "gpt", "value": "a painting of <image>"},
            ],
        },
        {"id": 2, "image": ["a.png", "b.png"], "conversations": [
            {"from": "human", "value": "Left <image> or right <image>?"}, {"from": "gpt", "value": "Left."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
        {"id": 3, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]  # fmt: skip
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows, indent=2))
    assert detect(str(path)) == "json"
    assert seen(SourceSpec(str(path), str(images))) == [
        (talk((0, "\nWrite a prompt for this image."), "a painting of <image>"), [png(2)]),
        (talk(("Left ", 0, " or right ", 1, "?"), "Left.", "Sure?", "Yes."), [png(0), png(1)]),
        (talk("Hi", "Hello"), []),
    ]


def test_openai_messages_with_pictures_as_data_urls_or_paths(tmp_path: Path, images: Path, png: Png) -> None:
    system = {"role": "system", "content": "You identify uncommon cheeses."}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Danbo"}]}
    asked = {"role": "user", "content": "What is this cheese?"}
    in_two_turns = [
        system,
        asked,
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url(png(5)), "detail": "low"}}]},
        answer,
    ]
    in_parts = [
        {"role": "user", "content": [
            {"type": "text", "text": "Is <image> "}, {"type": "text", "text": "this?"},
            {"type": "image_url", "image_url": {"url": "sub/c.png"}}, {"type": "image", "image": "a.png"}]},
        answer,
    ]  # fmt: skip
    path = write(tmp_path / "cheese.jsonl", {"messages": in_two_turns}, {"messages": in_parts})
    (first, first_bytes), second = seen(SourceSpec(str(path), str(images)))
    assert first[0] == Turn("system", ("You identify uncommon cheeses.",))
    assert (first[1:], first_bytes) == (talk(("What is this cheese?\n", 0), "Danbo"), [png(5)])
    assert second == (talk(("Is <image> this?", 0, 1), "Danbo"), [png(2), png(0)])


@pytest.mark.parametrize(("delimiter", "name"), [(",", "metadata.csv"), ("\t", "table.tsv"), (";", "table.csv")])
def test_caption_tables_of_files(images: Path, png: Png, delimiter: str, name: str) -> None:
    with (images / name).open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(
            [("file_name", "text"), ("a.png", 'a "red", round\nthing'), ("sub/c.png", "naïve; plain")]
        )
    assert detect(str(images / name)) == "csv"
    captions = [(talk((0,), 'a "red", round\nthing'), [png(0)]), (talk((0,), "naïve; plain"), [png(2)])]
    assert seen(SourceSpec(str(images / name))) == captions
    if name.startswith("metadata"):  # an ImageFolder of `datasets`: the folder stands for its table
        assert seen(SourceSpec(str(images))) == captions


def test_caption_tables_with_other_column_names_and_a_prompt(images: Path, png: Png) -> None:
    path = images / "open_clip.tsv"
    path.write_text("filepath\ttitle\nb.png\ta dog\n")
    spec = SourceSpec(str(path), columns=Columns(images="filepath", text="title"), prompt="<image>\nDescribe it.")
    assert seen(spec) == [(talk((0, "\nDescribe it."), "a dog"), [png(1)])]


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_caption_parquet_with_bytes_structs_or_paths(tmp_path: Path, images: Path, png: Png, kind: str) -> None:
    column = {"bytes": [png(0), png(1)], "struct": [{"bytes": png(0), "path": "x"}, {"bytes": None, "path": "b.png"}],
              "path": ["a.png", "b.png"]}[kind]  # fmt: skip
    pq.write_table(pa.table({"image": column, "caption": ["one", "two"]}), tmp_path / "captions.parquet")
    spec = SourceSpec(str(tmp_path / "captions.parquet"), str(images))
    assert seen(spec) == [(talk((0,), "one"), [png(0)]), (talk((0,), "two"), [png(1)])]


def test_a_folder_of_pictures_with_sidecars(images: Path, png: Png) -> None:
    (images / "a.txt").write_text("a red thing\n")
    said = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "Blue."}]
    (images / "sub" / "c.json").write_text(json.dumps({"image": "c.png", "conversations": said}))
    (images / "b.txt").write_text("counts")  # img2dataset leaves both; its .json holds no conversation
    (images / "b.json").write_text(json.dumps({"caption": "counts not", "width": 256}))
    (images / ".DS_Store").write_bytes(b"\0")
    assert detect(str(images)) == "folder"
    assert seen(SourceSpec(str(images))) == [
        (talk((0,), "a red thing"), [png(0)]),
        (talk((0,), "counts"), [png(1)]),
        (talk(("What is it?\n", 0), "Blue."), [png(2)]),
    ]


def pack(path: Path, members: list[tuple[str, bytes]], *, kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_webdataset_tars_in_order_and_at_random(tmp_path: Path, png: Png, kind: int) -> None:
    said = json.dumps({"conversations": [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "!"}]}).encode()
    long = "d/" * 60 + "x" * 90 if kind != tarfile.USTAR_FORMAT else "d/x"  # beyond a plain header's 100 letters
    members = [(f"{long}.png", png(0)), (f"{long}.txt", "ein Bär\n".encode()), ("000001.1.png", png(2)), ("000001.json", said),
               ("000001.0.png", png(1)), ("000001.cls", b"7")]  # fmt: skip
    path = pack(tmp_path / "shard-000000.tar", members, kind=kind)
    assert detect(str(path)) == "webdataset"
    spec = SourceSpec(str(path))
    assert seen(spec) == [(talk((0,), "ein Bär"), [png(0)]), (talk((0, 1, "?"), "!"), [png(1), png(2)])]
    source = open_source(spec)
    names = [name for row in source.records() if isinstance(row, Record) for name in row.images]
    assert [source.images.read(name) for name in reversed(names)] == [png(2), png(1), png(0)]


def saved(folder: Path, png: Png) -> Path:
    datasets = pytest.importorskip("datasets")
    said = [[{"role": "user", "content": f"<image>{i}"}, {"role": "assistant", "content": "yes"}] for i in range(5)]
    pictures = [{"bytes": png(i), "path": None} for i in range(5)]
    built = datasets.Dataset.from_dict({"messages": said, "image": pictures}).cast_column("image", datasets.Image())
    built.save_to_disk(str(folder), num_shards=2)
    return folder


def test_a_hugging_face_data_set_saved_on_disk_is_read_without_the_library(tmp_path: Path, png: Png) -> None:
    folder = saved(tmp_path / "saved", png)
    assert detect(str(folder)) == "arrow"
    assert seen(SourceSpec(str(folder))) == [(talk((0, str(i)), "yes"), [png(i)]) for i in range(5)]


def test_an_arrow_file_is_read_too(tmp_path: Path, png: Png) -> None:
    table = pa.table({"image": [png(i) for i in range(5)], "text": [str(i) for i in range(5)]})
    with pa.ipc.new_file(tmp_path / "x", table.schema) as file:
        file.write_table(table, max_chunksize=2)
    assert seen(SourceSpec(str(tmp_path / "x"))) == [(talk((0,), str(i)), [png(i)]) for i in range(5)]


def test_a_hub_data_set_comes_through_the_library(tmp_path: Path, png: Png, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "there").mkdir()
    pq.write_table(pa.table({"image": [png(0)], "text": ["one"]}), tmp_path / "there" / "train.parquet")
    assert seen(SourceSpec(str(tmp_path / "there"), format="hub")) == [(talk((0,), "one"), [png(0)])]
    with pytest.raises(PipelineError, match="cannot be fetched") as caught:
        open_source(SourceSpec("nobody/has-this", format="hub"))
    assert len(caught.value.line().splitlines()) == 1


def test_repack_keeps_every_row_and_makes_row_groups_small(tmp_path: Path, png: Png) -> None:
    table = pa.table({"image": [png(i) for i in range(7)], "text": [str(i) for i in range(7)], "id": range(7)})
    pq.write_table(table.replace_schema_metadata({"by": "someone"}), tmp_path / "big.parquet")
    run = CliRunner().invoke(app, ["repack", str(tmp_path / "big.parquet"), str(tmp_path / "small.parquet"), "--rows", "3"])
    assert run.exit_code == 0, run.output
    small = pq.ParquetFile(tmp_path / "small.parquet")
    assert small.read().equals(pq.read_table(tmp_path / "big.parquet"), check_metadata=True)
    assert [small.metadata.row_group(i).num_rows for i in range(small.num_row_groups)] == [3, 3, 1]


@pytest.mark.parametrize(("source", "said"), [("missing", "no such file"), ("text", "not a readable Parquet"), ("torn", "damaged")])
def test_repack_leaves_nothing_behind_when_it_fails(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "text").write_text("no Parquet")
    chance = random.Random(0)
    noise = pa.table({"x": [chance.randbytes(100) for _ in range(100)]})
    pq.write_table(noise, tmp_path / "torn", write_page_checksum=True)
    data = bytearray((tmp_path / "torn").read_bytes())
    data[5000] ^= 1
    (tmp_path / "torn").write_bytes(data)
    run = CliRunner().invoke(app, ["repack", str(tmp_path / source), str(tmp_path / "out")])
    assert run.exit_code == 2
    assert said in run.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "torn"]


# What holds for all of them.


def test_an_array_gives_what_its_rows_give_as_lines_whatever_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "é€😀" * (i % 7) + "x", "image": f"{i}.png", "n": [i, {"deep": -1.5e3}]} for i in range(200)]
    lines = write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    expected = [(row.images, row.turns) for row in open_source(SourceSpec(str(lines))).records() if isinstance(row, Record)]
    for window in (1, 7, 100, 1 << 20):
        monkeypatch.setattr("pipeline.formats.array.CHUNK", window)
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
