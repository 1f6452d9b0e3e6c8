"""Host memory that is used again: fresh pages cost more than the copy into them, and pinned ones cost more still.

It begins at a page, as rows in a file nearly do. Large pieces from malloc begin 16 bytes into one, and some processors copy
at half their rate where destination and source lie so close within their pages (AMD Zen 4: 9 instead of 19 GB/s).
"""

import mmap
import threading
import weakref

import numpy as np
import torch

CPU = torch.device("cpu")


def page_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array of unspecified content whose memory begins at a page."""
    size = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(size + mmap.PAGESIZE, np.uint8)
    start = -room.ctypes.data % mmap.PAGESIZE
    return room[start : start + size].view(dtype).reshape(shape)


class BufferPool:
    """Lends tensors [n, *shape]; their memory comes back by itself when the last tensor on it is gone.

    So nothing that still looks at a buffer (autograd, a caller that keeps a batch) can see it overwritten, and the pool
    never holds more buffers than were in use at once. Safe in several threads.

    Args:
        shape, dtype: one row's.
        device: where it is a GPU, memory is page-locked for it, which it copies from while it computes.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, device: torch.device = CPU) -> None:
        self._shape, self._dtype, self._device = shape, dtype, device
        self._free: list[np.ndarray] = []
        self._largest = 0
        self._lock = threading.Lock()

    def take(self, count: int) -> torch.Tensor:
        """A tensor [count, *shape] of unspecified content."""
        with self._lock:
            self._largest = max(self._largest, count)
            buffer = self._free.pop() if self._free else None
        if buffer is None or len(buffer) < count:
            buffer = self._allocate(self._largest)
        view = buffer[:count]
        weakref.finalize(view, self._free.append, buffer).atexit = False
        return torch.from_numpy(view)

    def _allocate(self, count: int) -> np.ndarray:
        size = (count, *self._shape)
        if self._device.type != "cuda":
            return page_aligned(size, self._dtype)
        kind = torch.float16 if self._dtype == np.float16 else torch.uint8
        with torch.cuda.device(self._device):  # a thread's own is the first, on which all processes would take memory
            return torch.empty(size, dtype=kind, pin_memory=True).numpy()
