"""Work done ahead of need, in threads: what reads files or waits for disks releases the interpreter.

A thread that hangs in a read (a dead network mount, a pipe) cannot be stopped, but nobody waits for it without an end.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from pipeline.core.errors import RESOURCE, PipelineError

Job = TypeVar("Job")
Made = TypeVar("Made")
GRACE = 2.0  # seconds that threads have to finish what they are at when nobody wants it any more


def patience() -> float:
    """Seconds after which work that does not move is given up: ten minutes, or GLANCE_PATIENCE in the environment."""
    try:
        return float(os.environ.get("GLANCE_PATIENCE", "600"))
    except ValueError:
        raise PipelineError("expected a number of seconds", where="GLANCE_PATIENCE") from None


def result(future: Future[Made], *, where: str = "") -> Made:
    """What a thread has made of its work; raises its error, or `PipelineError` when it has hung for `patience()` seconds.

    `where` says what the thread reads.
    """
    limit = patience()
    try:
        return future.result(timeout=limit)
    except TimeoutError:
        if future.done():  # the work's own error
            raise
        what = f"reading it has stood still for {limit:g} s: a disk or network mount that does not answer"
        remedy = "bring it back, or raise GLANCE_PATIENCE; the same command goes on"
        raise PipelineError(what, where=where, remedy=remedy, code=RESOURCE) from None


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that is left within seconds, whatever its threads hang in: those then go on alone, to no effect."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + GRACE
        for thread in list(getattr(pool, "_threads", ())):
            thread.join(max(0.0, until - time.monotonic()))


def prefetch(
    jobs: Iterable[Job],
    make: Callable[[Job], Made],
    *,
    depth: int = 2,
    threads: int = 1,
    where: Callable[[Job], str] = lambda _: "",
) -> Generator[tuple[Job, Made], Any, None]:
    """Each job with what `make` gives for it, in order, made up to `depth` jobs ahead by `threads` threads.

    To be closed (`contextlib.closing`) by whoever may stop before the end: it owns threads, and so may `jobs`, which it closes.
    `where` says what a job reads, for the line that tells of a read without an end.
    """
    with closing(_closable(jobs)) as coming, thread_pool(threads) as pool:
        waiting: deque[tuple[Job, Future[Made]]] = deque()
        for job in coming:
            waiting.append((job, pool.submit(make, job)))
            if len(waiting) > depth:
                first, future = waiting.popleft()
                yield first, result(future, where=where(first))
        while waiting:
            first, future = waiting.popleft()
            yield first, result(future, where=where(first))


def _closable(jobs: Iterable[Job]) -> Generator[Job, Any, None]:
    """The jobs as a generator, whose closing closes the one they come from."""
    source = iter(jobs)
    try:
        yield from source
    finally:
        if isinstance(source, Generator):
            source.close()
