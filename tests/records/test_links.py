"""Links below a data set's folders: the user's own are followed wherever they lead, a stranger's are refused by name."""

import json
import os
from pathlib import Path

import pytest
from faults import Png, drain

from pipeline.core.errors import PipelineError
from pipeline.params import Dataset
from pipeline.records import BadRow, ImageError, Record, open_dataset
from pipeline.records.formats import SourceSpec
from pipeline.records.images import ImageRoot


@pytest.fixture
def root(tmp_path: Path, png: Png) -> Path:
    """Pictures as `dvc add` leaves them under `cache.type symlink`, a folder on another disk, and a link over two hops."""
    cache, disk, root = tmp_path / ".dvc/cache/files/md5/ab", tmp_path / "disk", tmp_path / "pics"
    for folder in (cache, disk / "deep", root):
        folder.mkdir(parents=True)
    (cache / "cdef").write_bytes(png(0))
    (disk / "deep/b.png").write_bytes(png(1))
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "a.png").symlink_to(cache / "cdef")
    (root / "more").symlink_to(disk)
    (root / "again").symlink_to("more/deep")
    return root


def test_links_to_a_cache_or_a_disk_are_followed(root: Path, png: Png) -> None:
    images = ImageRoot(root)
    assert [images.read(name) for name in ("a.png", "more/deep/b.png", "again/b.png")] == [png(0), png(1), png(1)]
    assert images.read(str(root / "a.png")) == png(0)  # an absolute name below the root
    assert images.read("more/../a.png") == png(0)  # `..` is what the name says, not where the link has led


CLIMBS = ["../secret", "more/../../secret", "again/../../secret", "more/deep/../../../secret", "/etc/hostname", "./../secret",
          "a.png/../../secret", "{root}/../secret", "{root}x/secret"]  # fmt: skip


@pytest.mark.parametrize("name", CLIMBS)
@pytest.mark.parametrize("follow", [True, False])
def test_no_name_climbs_out_through_a_link(root: Path, name: str, follow: bool) -> None:
    with pytest.raises(ImageError, match="outside the image root"):
        ImageRoot(root, follow=follow).read(name.format(root=root))


def test_links_that_lead_out_can_be_forbidden(root: Path, png: Png) -> None:
    (root / "plain.png").write_bytes(png(2))
    (root / "inner.png").symlink_to(root / "plain.png")
    images = ImageRoot(root, follow=False)
    assert images.read("inner.png") == png(2)
    for name in ("a.png", "more/deep/b.png", "again/b.png"):
        with pytest.raises(ImageError, match=r"leads out of the image root -> .* set data\.\*\.links to follow"):
            images.read(name)


@pytest.mark.parametrize("links", ["follow", "refuse"])
def test_a_watched_folder_goes_through_linked_ones(root: Path, links: str) -> None:
    for folder, stem in ((root, "a"), (root / "more/deep", "b")):
        (folder / f"{stem}.txt").write_text(stem)
    rows = drain(SourceSpec(str(root), links=links))
    good = [row.images[0] for row in rows if isinstance(row, Record)]
    bad = {str(row.row): row.reason for row in rows if isinstance(row, BadRow)}
    if links == "follow":
        assert (good, bad) == (["a.png", "again/b.png", "more/deep/b.png"], {})
    else:
        assert good == ["a.png"]  # its words are told; its picture is a link out, and refused when it is read
        assert sorted(bad) == ["again", "more"]
        assert "leads out" in bad["more"]


def test_a_link_that_leads_back_up_is_a_row_that_is_told(root: Path) -> None:
    (root / "a.txt").write_text("a")
    for name in ("more", "again"):
        (root / name).unlink()
    (root / "round").symlink_to(root)
    (root / "sub").mkdir()
    (root / "sub/up").symlink_to("../..")
    rows = drain(SourceSpec(str(root)))
    assert {row.row for row in rows if isinstance(row, BadRow) and "leads back" in row.reason} == {"round", "sub/up/pics"}
    (root / "rows.jsonl").write_text("{}\n")
    with pytest.raises(PipelineError, match="leads back to a folder above it"):
        open_dataset(Dataset(records=str(root), images=str(root), mix={"**/*.jsonl": {"weight": 1.0}}))


def test_a_mix_s_files_may_be_links_unless_forbidden(root: Path, tmp_path: Path) -> None:
    row = '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]}\n'
    (tmp_path / "elsewhere.jsonl").write_text(row)
    (root / "rows.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    data = {"records": str(root), "images": str(root), "mix": {"*.jsonl": {"weight": 1.0}}}
    found = list(open_dataset(Dataset(**data)).records())
    assert [type(row) for row in found] == [Record]
    with pytest.raises(PipelineError, match="leads out of the data set's folder"):
        open_dataset(Dataset(**data, links="refuse"))


def test_a_saved_folder_s_list_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    for name in ("../secret", "/etc/hostname", "a/../../b"):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        with pytest.raises(PipelineError, match="lies outside the folder"):
            drain(SourceSpec(str(tmp_path)))


def test_a_dangling_link_and_one_to_no_file_are_told(root: Path, tmp_path: Path) -> None:
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    (root / "pipe.png").symlink_to(tmp_path / "pipe")
    (root / "null.png").symlink_to("/dev/zero")
    images = ImageRoot(root)
    for name, said in (("gone.png", "no such image"), ("pipe.png", "not a regular file"), ("null.png", "not a regular file")):
        with pytest.raises(ImageError, match=said):
            images.read(name)
