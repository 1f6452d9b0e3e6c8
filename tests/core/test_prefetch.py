"""Work done ahead of need: in order, within its depth, its errors where their jobs stand."""

from collections.abc import Iterator

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
