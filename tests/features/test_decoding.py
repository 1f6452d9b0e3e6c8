"""Pictures decoded in workers: in batches as asked for, by processes that may die or hang."""

import faulthandler
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World

from pipeline.core.errors import PipelineError
from pipeline.features.decoder_pool import AHEAD, DecoderPool
from pipeline.features.decoding import SHARED, DecodedImages, ImageFile, decoded_batches, piece_of
from pipeline.features.distinct import distinct_images
from pipeline.records.images import ImageRoot, digest


@pytest.mark.parametrize("batch", [1, 10, 16, 256])
@pytest.mark.parametrize("workers", [0, 1, 2, 14, 62])
@pytest.mark.parametrize("side", [64, 224, 384, 1024])
def test_what_is_under_way_stays_within_its_memory(batch: int, workers: int, side: int) -> None:
    picture = 3 * side**2
    piece = piece_of(batch, picture, workers)
    assert 1 <= piece <= batch
    assert piece == 1 or AHEAD * workers * piece * picture <= SHARED


def test_a_batch_is_sent_whole_where_it_can() -> None:
    assert piece_of(16, 3 * 224**2, 2) == 16


class Numbered:
    """Pictures whose pixels are their number; `spoil` is called in the worker, before it decodes one."""

    shape = (3, 4, 4)

    def __init__(self, spoil: Callable[[int], object] = int) -> None:
        self._spoil = spoil

    def __getitem__(self, item: int) -> tuple[np.ndarray | PipelineError, float]:
        self._spoil(item)
        return (PipelineError("bad", where=self.place(item)) if item == 7 else np.full(self.shape, item, np.uint8)), 0.5

    def place(self, item: int) -> str:
        return f"{item}.png"


def strike(number: int) -> None:
    """Send this process a signal, of which pytest would print a page."""
    faulthandler.disable()
    os.kill(os.getpid(), number)


def once(folder: Path, number: int, act: Callable[[], object]) -> Callable[[int], object]:
    """Do something to the first worker that comes to a picture, and to no other."""

    def spoil(item: int) -> None:
        if item == number and not (folder / "done").exists():
            (folder / "done").touch()
            act()

    return spoil


def decode(images: Numbered, *, workers: int = 2) -> list[int]:
    """The first pixel of every picture, -1 for a bad one; no process stays behind, however it ends."""
    pieces = iter([[start, start + 1, start + 2] for start in range(0, 60, 3)])
    found, before = list[int](), children()
    try:
        with closing(DecoderPool(images, piece=3, workers=workers)) as pool:
            for decoded in pool.decode(pieces):
                assert decoded.seconds == 1.5
                pixels = iter(decoded.pixels[:, 0, 0, 0].tolist())
                found += [-1 if error else next(pixels) for error in decoded.errors]
    finally:
        assert children() == before
    return found


def children() -> set[str]:
    """Processes that this one has started and not yet buried."""
    return {process for task in Path("/proc/self/task").iterdir() for process in (task / "children").read_text().split()}


EXPECTED = [-1 if item == 7 else item for item in range(60)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
@pytest.mark.parametrize("at", [0, 7, 59])
def test_a_worker_that_dies_or_stops_is_replaced_and_nothing_changes(
    number: signal.Signals, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLANCE_PATIENCE", "1")
    monkeypatch.setattr("pipeline.features.decoder_pool.LOOK", 0.1)
    found = decode(Numbered(once(tmp_path, at, lambda: strike(number))))
    assert found == EXPECTED
    said = capsys.readouterr().err
    assert f"at {at}.png: another one goes on" in said
    assert (number.name in said) == (number != signal.SIGSTOP)


def test_workers_that_others_kill_at_any_time_are_replaced(tmp_path: Path) -> None:
    victims: list[int] = []

    def kill() -> None:
        (tmp_path / "pids").touch()
        while not stop.wait(0.02):
            for process in {int(line) for line in (tmp_path / "pids").read_text().split()} - set(victims):
                if len(victims) < 4:
                    victims.append(process)
                    os.kill(process, signal.SIGKILL)

    def note(_: int) -> None:
        with (tmp_path / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.01)

    stop = threading.Event()
    killer = threading.Thread(target=kill)
    killer.start()
    try:
        assert decode(Numbered(note)) == EXPECTED
    finally:
        stop.set()
        killer.join()
    assert victims


@pytest.mark.parametrize(
    ("act", "code", "said"),
    [
        (lambda: strike(signal.SIGSEGV), 3, r"31\.png: .* was ended by SIGSEGV, 3 times -> remove it"),
        (lambda: strike(signal.SIGKILL), 5, r"31\.png: .* was ended by SIGKILL, 3 times.*lower runtime\.workers"),
        (lambda: os._exit(3), 3, r"31\.png: .* exit code 3, 3 times"),
        (lambda: time.sleep(999), 5, r"31\.png: .* has stood still for 0\.5 s, 3 times.*network mount"),
    ],
)
def test_a_picture_that_no_worker_survives_is_named(
    act: Callable[[], object], code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLANCE_PATIENCE", "0.5")
    monkeypatch.setattr("pipeline.features.decoder_pool.LOOK", 0.1)
    with pytest.raises(PipelineError, match=said) as caught:
        decode(Numbered(lambda item: act() if item == 31 else None))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("raised", "said"), [(MemoryError(), "out of memory.*lower runtime.workers"), (TypeError("x"), "unexpected TypeError: x")]
)
def test_what_a_worker_cannot_tell_of_a_picture_ends_the_run_in_one_line(raised: Exception, said: str) -> None:
    def spoil(item: int) -> None:
        if item == 31:
            raise raised

    with pytest.raises(PipelineError, match=said):
        decode(Numbered(spoil))


def test_many_long_errors_pass_a_pipe_that_holds_few() -> None:
    class Bad(Numbered):
        def __getitem__(self, item: int) -> tuple[np.ndarray | PipelineError, float]:
            return PipelineError("x" * 100_000, where=self.place(item)), 0.5

    assert decode(Bad()) == [-1] * 60


def test_workers_end_with_who_asked_for_them() -> None:
    """Killed with -9 it cannot tell them; one hangs, one waits for work."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        pool = DecoderPool(Numbered(lambda item: time.sleep(999) if item == 0 else None), piece=1, workers=2)
        pool._hand_out(iter([[0], [1]]))
        os.write(writer, " ".join(str(worker.process) for worker in pool._workers.values()).encode())
        time.sleep(999)
    workers = [int(number) for number in os.read(reader, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(200):
        alive = [number for number in workers if Path(f"/proc/{number}/stat").exists() and not _is_zombie(number)]
        if not alive:
            break
        time.sleep(0.02)
    assert len(workers) == 2
    assert alive == []
    os.close(reader)
    os.close(writer)


def _is_zombie(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


SMALL = """
import sys
sys.path[:0] = ["tests/features", "tests"]
import numpy as np
from contextlib import closing
from pipeline.features.decoder_pool import DecoderPool
class Large:
    shape = (3, 336, 336)
    def __getitem__(self, item): return np.full(self.shape, item % 251, np.uint8), 0.0
    def place(self, item): return str(item)
with closing(DecoderPool(Large(), piece=256, workers=2)) as pool:
    found = [piece.pixels[:, 0, 0, 0].tolist() for piece in pool.decode(iter([list(range(256)), list(range(256, 512))]))]
print(sum(found, []) == [item % 251 for item in range(512)])
"""


@pytest.mark.slow
def test_a_container_with_little_shared_memory_decodes_large_batches() -> None:
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1"', sys.executable]
    if subprocess.run([*command[:2], "true"], capture_output=True).returncode:
        pytest.skip("no right to mount here")
    done = subprocess.run([*command, SMALL], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_pieces_make_the_batches_that_were_asked_for(
    tmp_path: Path, png: Callable[[int], bytes], world: World, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order asked for, the bad ones told in their places, whatever the size of a piece."""
    for number in range(11):
        (tmp_path / f"{number}.png").write_bytes(b"bad" if number == 4 else png(number))
    root = ImageRoot(tmp_path)
    files = [ImageFile(root, f"{number}.png") for number in range(11)]
    keys = np.frombuffer(b"".join(digest(root.read(file.name)) for file in files), np.uint8).reshape(-1, 32)
    images, order = DecodedImages(files, keys, world.clip.preprocess), [3, 4, 10, 0, 9, 1, 8, 2, 7]
    found = []
    for shared in (10**9, AHEAD * max(workers, 1) * 3 * 32 * 32):
        monkeypatch.setattr("pipeline.features.decoding.SHARED", shared)
        found.append(list(decoded_batches(images, batch=4, workers=workers, order=order)))
        assert [len(errors) for _, errors, _ in found[-1]] == [4, 4, 1]
        bad = [number for number, error in zip(order, [e for _, errors, _ in found[-1] for e in errors], strict=True) if error]
        assert bad == [4]
    for (one, _, _), (other, _, _) in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_batch_of_bad_pictures_has_no_pixels(tmp_path: Path, world: World) -> None:
    (tmp_path / "x.png").write_bytes(b"bad")
    files, hashes = distinct_images([(ImageRoot(tmp_path), ["x.png"])])
    ((pixels, errors, _),) = decoded_batches(DecodedImages(files, hashes, world.clip.preprocess), batch=4, workers=0)
    assert pixels is None
    assert isinstance(errors[0], PipelineError)
