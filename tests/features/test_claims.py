"""Several processes, machines or not, that encode into one store: each shard once, a lost one's by the others, the same bytes.

This file is also what the processes run (`python -m test_claims`).
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from pipeline.features import claims
from pipeline.features.claims import Claims
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.encoding import Encoding
from pipeline.features.extraction import extract
from pipeline.features.shard_plan import NewShard
from pipeline.records.images import ImageRoot

PICTURES, SHARD = 12, 2


class Slow(Encoder):
    """Takes its time, and notes whom it has encoded."""

    def begin(self, pixels: torch.Tensor, names: Any) -> Encoding:
        time.sleep(self.__dict__["pause"])
        with Path(self.__dict__["notes"]).open("a") as file:
            file.writelines(f"{name}\n" for name in names)
        return super().begin(pixels, names)


def main(folder: Path, clip: str, name: str, machine: str, pause: float, lease: float) -> None:
    """What each process does: all pictures, from its own place, on a machine of its own."""
    torch.set_num_threads(1)
    claims.machine = lambda: machine  # type: ignore[assignment]
    claims.LEASE, claims.POLL = lease, 0.02
    encoder = Slow(clip, precision="float32", device=torch.device("cpu"), batch=SHARD)
    encoder.__dict__ |= {"pause": pause, "notes": folder / f"{name}.txt"}
    files, hashes = distinct_images([(ImageRoot(folder / "images"), [f"{number}.png" for number in range(PICTURES)])])
    (folder / f"{name}.ready").touch()
    while not (folder / "go").exists():
        time.sleep(0.005)
    done = extract(files, hashes, encoder, stores=[folder / "store"], out=folder / name, shard_rows=SHARD, workers=0)
    print(json.dumps({"encoded": done.encoded, "here": done.here}))


@pytest.fixture
def folder(tmp_path: Path, png: Callable[[int], bytes]) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(PICTURES):
        (tmp_path / "images" / f"{number}.png").write_bytes(png(number))
    return tmp_path


@pytest.fixture
def start(folder: Path, vision_folders: dict[str, Path]) -> Callable[..., subprocess.Popen[str]]:
    def begin(name: str, *, machine: str = "here", pause: float = 0.0, lease: float = 60.0) -> subprocess.Popen[str]:
        call = f"main(Path({str(folder)!r}), {str(vision_folders['clip'])!r}, {name!r}, {machine!r}, {pause}, {lease})"
        command = [sys.executable, "-c", f"from pathlib import Path; from test_claims import main; {call}"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return begin


def go(folder: Path, *names: str) -> None:
    """Have processes begin, at once, when all of these are ready."""
    began = time.monotonic()
    while not all((folder / f"{name}.ready").exists() for name in names):
        assert time.monotonic() - began < 100
        time.sleep(0.005)
    (folder / "go").touch()


def finish(process: subprocess.Popen[str]) -> dict[str, int]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def seen(folder: Path, *names: str) -> list[str]:
    """Whom these processes have encoded, as often as they have."""
    notes = [folder / f"{name}.txt" for name in names]
    return [line for path in notes if path.exists() for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def at_work(folder: Path) -> bool:
    """Whether a shard is finished and another is claimed."""
    return bool(list(folder.glob("store/*/*.h5")) and list(folder.glob("store/*/.*.claim")))


def kill_at_work(process: subprocess.Popen[str], folder: Path) -> None:
    while not at_work(folder):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert list(folder.glob("store/*/.*.claim")), "or nothing is left to be taken over"


@pytest.mark.slow
def test_two_machines_encode_every_picture_once_between_them_and_each_has_the_output_of_one(
    folder: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    running = [start(name, machine=name, pause=0.15) for name in ("a", "b")]
    go(folder, "a", "b")
    found = [finish(process) for process in running]
    assert sorted(seen(folder, "a", "b")) == sorted(set(seen(folder, "a", "b")))
    assert len(seen(folder, "a", "b")) == PICTURES == sum(each["here"] for each in found)
    assert all(0 < each["here"] < PICTURES for each in found), "both had a part"
    (folder / "store").rename(folder / "shared")
    finish(start("alone"))
    assert contents(folder / "a") == contents(folder / "b") == contents(folder / "alone")
    assert not list(folder.glob("shared/*/.*")), "no claim and no temporary file is left"


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "lease"), [("here", 60.0), ("there", 1.0)])
def test_what_a_killed_process_had_claimed_is_encoded_by_the_next_run(
    folder: Path, start: Callable[..., subprocess.Popen[str]], machine: str, lease: float
) -> None:
    """At once where its machine is this one, else when its lease is over."""
    go(folder)
    kill_at_work(start("lost", machine=machine, pause=0.2), folder)
    there = {path.name for path in folder.glob("store/*/*.h5")}
    finish(start("next", lease=lease))
    finished = SHARD * len(there)
    assert len(seen(folder, "next")) == PICTURES - finished
    (folder / "store").rename(folder / "shared")
    finish(start("alone"))
    assert contents(folder / "next") == contents(folder / "alone")
    assert not list(folder.glob("shared/*/.*"))


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["here", "there"])
def test_what_a_killed_machine_had_claimed_is_taken_over_within_a_run_that_waits(
    folder: Path, start: Callable[..., subprocess.Popen[str]], machine: str
) -> None:
    """Killed while it encodes, with the other at work beside it; a claim of another machine is lost once its lease is over."""
    lost = start("lost", machine=machine, pause=0.3, lease=2.0)
    other = start("other", pause=0.3, lease=2.0)
    go(folder, "lost", "other")
    while not (at_work(folder) and seen(folder, "lost")):
        assert lost.poll() is None, lost.communicate()[1]
        time.sleep(0.005)
    lost.kill()
    lost.wait()
    finish(other)
    (folder / "store").rename(folder / "shared")
    finish(start("alone"))
    assert contents(folder / "other") == contents(folder / "alone")
    assert set(seen(folder, "lost", "other")) == set(seen(folder, "alone"))
    assert not list(folder.glob("shared/*/.*"))


@pytest.fixture
def shard(tmp_path: Path) -> NewShard:
    return NewShard(tmp_path / "0123.h5", np.zeros((1, 32), np.uint8), np.array([-1]), np.array([0]))


def test_a_claim_is_one_process_s_until_it_is_given_back(shard: NewShard) -> None:
    one, other = Claims(), Claims()
    assert one.take(shard)
    assert not other.take(shard)
    assert f"process {os.getpid()} on " in other.holder(shard.path)
    one.release(shard.path)
    assert other.take(shard)
    other.close()
    assert list(shard.path.parent.iterdir()) == []


def test_a_shard_that_is_there_is_not_claimed_unless_it_is_to_be_replaced(shard: NewShard) -> None:
    shard.path.write_bytes(b"a hole")
    assert not Claims().take(shard)
    found = shard.path.stat()
    again = NewShard(shard.path, shard.hashes, shard.stored, shard.fresh, (found.st_ino, found.st_mtime_ns))
    assert Claims().take(again)
    shard.path.unlink()
    shard.path.with_suffix(".new").write_bytes(b"whole")
    shard.path.with_suffix(".new").rename(shard.path)
    assert not Claims().take(again)


def test_one_that_is_renewed_is_never_lost_and_one_that_is_not_is_after_its_lease(
    shard: NewShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the watcher's clock: what a claim's time says of the day counts for nothing."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    holder, watcher = Claims(), Claims()
    assert holder.take(shard)
    (claim,) = shard.path.parent.glob(".*.claim")
    os.utime(claim, (0, 0))  # as of a machine whose clock is far behind
    for _ in range(5):
        assert not watcher.take(shard)
        now[0] += 0.6 * claims.LEASE
        holder.renew()
    now[0] += 0.6 * claims.LEASE
    assert not watcher.take(shard)  # the last renewal is seen here, and counts from here
    now[0] += 0.6 * claims.LEASE
    assert not watcher.take(shard)
    now[0] += 0.6 * claims.LEASE
    assert watcher.take(shard)
    holder.close()
    assert not Claims().take(shard), "who has lost it does not give back what is another's"


def test_of_many_that_find_a_lost_claim_one_takes_it(shard: NewShard, tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not psutil.pid_exists(gone.pid)
    held = Claims()
    assert held.take(shard)
    (claim,) = tmp_path.glob(".*.claim")
    claim.write_text(claim.read_text().replace(f'"process": {os.getpid()}', f'"process": {gone.pid}'))
    assert sum(Claims().take(shard) for _ in range(5)) == 1


def test_of_two_that_share_machine_and_process_number_one_alone_has_each_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in two containers of one name: threads of this process stand for them."""
    rows = np.zeros((1, 32), np.uint8)
    shards = [NewShard(tmp_path / f"{number}.h5", rows, np.array([-1]), np.array([0])) for number in range(5)]
    both, link = Barrier(2, timeout=60), os.link

    def link_in_turn(source: Path, target: Path) -> None:
        second = both.wait()  # both have written who they are
        if second:
            both.wait()
        try:
            link(source, target)
        finally:
            if not second:
                both.wait()
            both.wait()

    monkeypatch.setattr(os, "link", link_in_turn)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda mine: [mine.take(shard) for shard in shards], (Claims(), Claims()))
    assert [sum(pair) for pair in zip(first, second, strict=True)] == [1] * len(shards)


def test_a_folder_without_links_will_do(shard: NewShard, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    one = Claims()
    assert one.take(shard)
    assert not Claims().take(shard)
    one.close()
    assert list(shard.path.parent.iterdir()) == []
