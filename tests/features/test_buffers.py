"""Buffers that come back by themselves, and never while anything still looks at them."""

import mmap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.features.store.buffers import BufferPool, page_aligned

ROW, HALF = (3, 5), np.dtype("<f2")


def test_a_buffer_is_used_again_when_its_last_tensor_is_gone() -> None:
    pool = BufferPool(ROW, HALF)
    first = pool.take(4)
    place = first.data_ptr()
    assert (first.shape, first.dtype) == ((4, 3, 5), torch.float16)
    held = first[1:]
    del first
    assert pool.take(4).data_ptr() != place, "a view of it is still alive"
    del held
    places = {pool.take(2).data_ptr() for _ in range(3)}
    assert place in places | {pool.take(4).data_ptr()}


def test_buffers_begin_at_a_page_and_fit_their_rows() -> None:
    for count in (1, 7, 300):
        assert page_aligned((count, *ROW), HALF).ctypes.data % mmap.PAGESIZE == 0
        taken = BufferPool(ROW, HALF).take(count)
        assert taken.data_ptr() % mmap.PAGESIZE == 0
        taken.fill_(2)
        assert (taken == 2).all()


def test_what_autograd_keeps_is_not_overwritten() -> None:
    pool = BufferPool((5,), HALF)
    weight = torch.ones(5, requires_grad=True)
    taken = pool.take(2)
    taken.fill_(3)
    loss = (taken * weight.half()).sum()
    del taken
    pool.take(2).fill_(100)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [6.0] * 5


def test_a_smaller_buffer_gives_way_to_one_that_is_large_enough() -> None:
    pool = BufferPool((1,), HALF)
    pool.take(2)
    assert len(pool.take(9)) == 9
    assert len(pool.take(0)) == 0


def test_memory_is_bounded_by_what_is_in_use_at_once() -> None:
    pool = BufferPool(ROW, HALF)
    places = set()
    for count in [4, 2, 3, 4] * 25:
        places.add(pool.take(count).data_ptr())
    assert len(places) <= 2


def test_threads_never_share_a_buffer() -> None:
    pool = BufferPool((64,), np.dtype("|u1"))

    def fill(value: int) -> bool:
        tensor = pool.take(1 + value % 7)
        tensor.fill_(value % 251)
        return bool((tensor == value % 251).all())

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(fill, range(2000)))
