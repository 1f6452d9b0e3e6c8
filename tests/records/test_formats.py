"""Formats: each one's documented example gives the same records and picture bytes."""

import csv
import io
import json
import os
import random
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from format_examples import Png, image_folder, pack, saved, seen, talk, url, write
from PIL import Image
from typer.testing import CliRunner

from pipeline.core.errors import PipelineError
from pipeline.records.__main__ import app
from pipeline.records.formats import Columns, SourceSpec, detect, open_source
from pipeline.records.record import Record, Turn


@pytest.fixture
def images(tmp_path: Path, png: Png) -> Path:
    return image_folder(tmp_path, png)


# The documented example of each format, as its project's own pages give it.


def test_a_comma_in_a_file_name_of_llava_is_part_of_the_name(tmp_path: Path, images: Path, png: Png) -> None:
    (images / "a, b.png").write_bytes(png(3))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]
    path = write(tmp_path / "llava.jsonl", {"id": "1", "image": "a, b.png", "conversations": turns})
    assert seen(SourceSpec(str(path), str(images))) == [(talk((0, "\nWhat?"), "It."), [png(3)])]


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


@pytest.mark.parametrize(
    ("source", "said"), [("missing", "no such file"), ("text", "not a readable Parquet"), ("torn", "damaged"), ("pipe", "no file")]
)
def test_repack_leaves_nothing_behind_when_it_fails(tmp_path: Path, source: str, said: str) -> None:
    (tmp_path / "text").write_text("no Parquet")
    chance = random.Random(0)
    noise = pa.table({"x": [chance.randbytes(100) for _ in range(100)]})
    pq.write_table(noise, tmp_path / "torn", write_page_checksum=True)
    data = bytearray((tmp_path / "torn").read_bytes())
    data[5000] ^= 1
    (tmp_path / "torn").write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    run = CliRunner().invoke(app, ["repack", str(tmp_path / source), str(tmp_path / "out")])
    assert run.exit_code == 2
    assert said in run.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "text", "torn"]
