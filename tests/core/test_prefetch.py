"""Work done ahead of need: in order, within its depth, its errors where their jobs stand."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from pipeline.core.errors import PipelineError
from pipeline.core.prefetch import prefetch


@pytest.mark.parametrize("depth", [1, 2, 9])
def test_running_ahead_keeps_the_order_and_stays_within_its_depth(depth: int) -> None:
    taken, finished = [], []

    def jobs() -> Iterator[int]:
        for job in range(20):
            taken.append(job)
            yield job

    for job, made in prefetch(jobs(), lambda job: job * job, depth=depth):
        assert made == job * job
        finished.append(job)
        assert len(taken) <= len(finished) + depth
    assert finished == list(range(20))


def test_an_error_ahead_comes_out_where_its_job_stands() -> None:
    def make(job: int) -> int:
        if job == 2:
            raise PipelineError("bad image", where="x.png")
        return job

    made = prefetch(range(9), make)
    assert [next(made), next(made)] == [(0, 0), (1, 1)]
    with pytest.raises(PipelineError, match=r"x\.png"):
        next(made)


def test_closing_it_closes_where_jobs_come_from_and_ends_its_threads() -> None:
    ended: list[str] = []

    def jobs() -> Iterator[int]:
        try:
            yield from range(99)
        finally:
            ended.append("jobs")

    before = set(threading.enumerate())
    with closing(prefetch(prefetch(jobs(), abs), lambda job: job[1])) as made:
        next(made)
        assert set(threading.enumerate()) - before
    assert ended == ["jobs"]
    assert set(threading.enumerate()) == before


def test_a_timeout_that_the_work_itself_raises_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(_: int) -> int:
        raise TimeoutError("the server's")

    with pytest.raises(TimeoutError, match="the server's"), closing(prefetch([1], make)) as made:
        next(made)
    monkeypatch.setenv("GLANCE_PATIENCE", "soon")
    with pytest.raises(PipelineError, match="GLANCE_PATIENCE: expected a number of seconds"):
        next(prefetch([1], abs))
