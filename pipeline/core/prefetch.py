"""Work done ahead of need, in threads: what reads files or waits for disks releases the interpreter."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Made = TypeVar("Made")


def prefetch(jobs: Iterable[Job], make: Callable[[Job], Made], *, depth: int = 2, threads: int = 1) -> Iterator[tuple[Job, Made]]:
    """Each job with what `make` gives for it, in order, made up to `depth` jobs ahead by `threads` threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[tuple[Job, Future[Made]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.submit(make, job)))
                if len(waiting) > depth:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
