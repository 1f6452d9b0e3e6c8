"""Which process encodes which shard, where several share a store and know of each other through its folder alone.

A claim is a file beside the shard that one process alone can create (O_EXCL, which network file systems have too). Its holder
touches it as it goes on; one that has not changed for `LEASE` seconds, by the clock of whoever watches it, is lost, and so is one
whose process was of this machine and is gone. No result depends on claims: a shard's name and bytes follow from its images, and
it appears whole, so two processes that encode the same one lose time and nothing else.

Not the locks of `pipeline.core.locks`, which have to exclude others and so may fail: those are the system's, of one machine, and
end with a process. Other machines see them on some file systems and not on others; a claim is lost by silence, anywhere.
"""

import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.core import RESOURCE, PipelineError, is_alive, machine
from pipeline.features.shard_plan import NewShard

LEASE = 180.0  # seconds; a holder renews with every batch that it encodes, a dozen times a lease at most
UNWRITTEN = 2.0  # seconds that a claim may be empty
POLL = 1.0  # seconds between two looks at what others have claimed
DAY = 86400


class Claims:
    """The claims that this process holds in the store's folders; `close` gives back what is left of them."""

    def __init__(self) -> None:
        self._held: dict[Path, str] = {}
        self._seen: dict[Path, tuple[tuple[str, int], float]] = {}  # of others: what it was, and since when it has been so
        self._renewed = time.monotonic()

    def take(self, shard: NewShard) -> bool:
        """Whether the shard is this process's to encode: it is not there, and nobody else who is alive has claimed it."""
        claim = _claim(shard.path)
        if shard.is_written() or not (self._create(claim) or (self._take_over(claim) and self._create(claim))):
            return False
        if shard.is_written():  # finished and given back in between
            self.release(shard.path)
            return False
        return True

    def renew(self) -> None:
        """Say that this process goes on; cheap, to be called often."""
        if time.monotonic() - self._renewed < LEASE / 12:
            return
        for claim in self._held:
            with suppress(OSError):  # taken over while this process slept: two encode it then
                os.utime(claim)
        self._renewed = time.monotonic()

    def release(self, shard: Path) -> None:
        """Give a claim back, unless another process has taken it over."""
        claim = _claim(shard)
        text = self._held.pop(claim)
        with suppress(OSError):
            if claim.read_text(encoding="utf-8") == text:
                claim.unlink()

    def close(self) -> None:
        for claim in list(self._held):
            self.release(_shard(claim))

    def holder(self, shard: Path) -> str:
        """Who has claimed a shard, in words; empty where nobody has."""
        try:
            found = json.loads(_claim(shard).read_text(encoding="utf-8"))
            return f"process {found['process']} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def _create(self, claim: Path) -> bool:
        """Whether the claim is new and ours: a link to a file that is written already, so that it is never without its holder."""
        text, aside = json.dumps({**_myself(), "claim": uuid.uuid4().hex}), _aside(claim)
        try:
            aside.write_text(text, encoding="utf-8")
            try:
                os.link(aside, claim)
            except FileExistsError:
                if claim.read_text(encoding="utf-8") != text:  # a network's file system may say so of what it has just made
                    return False
            except OSError:  # it has no links
                claim.touch(exist_ok=False)
                claim.write_text(text, encoding="utf-8")
        except (FileExistsError, FileNotFoundError):
            return False
        except OSError as error:
            raise PipelineError(f"cannot be written: {error.strerror}", where=str(claim), code=RESOURCE) from None
        finally:
            with suppress(OSError):
                aside.unlink()
        self._held[claim] = text
        return True

    def _take_over(self, claim: Path) -> bool:
        """Remove a claim whose holder is lost; False while it may be at work."""
        try:
            with claim.open(encoding="utf-8") as file:  # opened before its time is asked: a network's file system looks anew
                text, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return True
        before, since = self._seen.get(claim, (None, 0.0))
        if before != (text, changed):
            since = time.monotonic()
            self._seen[claim] = (text, changed), since
        if not _is_gone(text) and time.monotonic() - since < (LEASE if text else UNWRITTEN):
            return False
        aside = _aside(claim)
        with suppress(OSError):
            os.replace(claim, aside)
            if aside.read_text(encoding="utf-8") != text:  # another process was quicker: it is that one's claim
                os.link(aside, claim)
            aside.unlink()
        return True


class ClaimedShards:
    """Shards that this process could claim, in order, claimed one by one as they are needed.

    `images` gives the numbers of the images they lack, and may run ahead of what is iterated.
    """

    def __init__(self, todo: Iterable[NewShard], claims: Claims) -> None:
        self._left, self._claims = iter(todo), claims
        self._to_decode: deque[NewShard] = deque()
        self._to_write: deque[NewShard] = deque()

    def __iter__(self) -> Iterator[NewShard]:
        while self._to_write or self._claim():
            yield self._to_write.popleft()

    def images(self) -> Iterator[int]:
        while self._to_decode or self._claim():
            yield from self._to_decode.popleft().fresh.tolist()

    def _claim(self) -> bool:
        found = next((shard for shard in self._left if self._claims.take(shard)), None)
        if found is not None:
            self._to_decode.append(found)
            self._to_write.append(found)
        return found is not None


def remove_old_claims(folder: Path) -> None:
    """Delete claims of shards that are there, and those that nobody has touched for a day."""
    for claim in folder.glob(".*.claim"):
        with suppress(OSError):
            if _shard(claim).exists() or time.time() - claim.stat().st_mtime > DAY:
                claim.unlink()


def _claim(shard: Path) -> Path:
    return shard.with_name(f".{shard.stem}.claim")


def _shard(claim: Path) -> Path:
    return claim.with_name(claim.name.removeprefix(".").removesuffix(".claim") + ".h5")


def _aside(claim: Path) -> Path:
    """A name that no other claimant has: containers may agree in host name and process number, threads in both."""
    return claim.with_name(f"{claim.name}.{uuid.uuid4().hex[:8]}.{os.getpid()}@{machine()}.tmp")


def _myself() -> dict[str, Any]:
    space = Path("/proc/self/ns/pid")  # containers of one name count their processes each for itself
    return {"host": machine(), "space": os.readlink(space) if space.is_symlink() else "", "process": os.getpid()}


def _is_gone(text: str) -> bool:
    """Whether a claim is of a process of this machine that has ended."""
    try:
        found = json.loads(text)
        mine = _myself()
        return all(found[key] == mine[key] for key in ("host", "space")) and not is_alive(int(found["process"]))
    except (ValueError, KeyError, TypeError):
        return False
