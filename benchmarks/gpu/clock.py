"""Time, kernels and memory on whatever device there is; nothing here asks a CPU for what only a card has."""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

REPEATS = 5


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def spread(values: Iterable[float], digits: int = 1) -> dict[str, float]:
    """Smallest, median and largest."""
    found = sorted(values)
    return {
        name: round(value, digits) for name, value in (("min", found[0]), ("median", statistics.median(found)), ("max", found[-1]))
    }


def seconds_a_call(work: Callable[[], Any], device: torch.device, *, seconds: float) -> list[float]:
    """What a call takes, in each of a few groups of calls that together last about `seconds`; two calls go before."""
    for _ in range(2):
        work()
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    once = time.perf_counter() - began
    calls = max(1, int(seconds / REPEATS / max(once, 1e-6)))
    found = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait_for(device)
        found.append((time.perf_counter() - began) / calls)
    return found


def first_call(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, until the device has done it: the first of a compiled function compiles it."""
    began = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - began


@dataclass(slots=True)
class Window:
    """Called after every step of a run; its clock runs from step `first` to step `last`, both awaited on the device.

    Both ends are steps, not the run's own, so that starting, ending and what is done ahead are the same at either.
    """

    first: int
    last: int
    device: torch.device
    steps: int = 0
    waited: float = 0.0  # added to by whoever waits for data
    stamps: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, _: Any = None) -> None:
        self.steps += 1
        if self.steps in (self.first, self.last):
            wait_for(self.device)
            self.stamps.append((time.perf_counter(), self.waited))

    @property
    def seconds(self) -> float:
        """Of the steps between."""
        return self.stamps[1][0] - self.stamps[0][0]

    @property
    def waiting(self) -> float:
        """Share of them that went by waiting for data."""
        return (self.stamps[1][1] - self.stamps[0][1]) / self.seconds


def kernel_seconds(work: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds in which the card did anything at all while `work` ran, copies included; None without a card.

    The profiler slows the host, not the kernels: their time is to be held against a clock that ran without it.
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        wait_for(device)
    spans = sorted((e.time_range.start, e.time_range.end) for e in found.events() if e.device_type == DeviceType.CUDA)
    busy = end = 0.0
    for start, stop in spans:  # microseconds; streams overlap
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6


def reset_peak(device: torch.device) -> None:
    """Forget the largest memory so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def held_bytes(device: torch.device) -> int:
    """Memory that tensors hold on the card now; 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int | None:
    """Most that tensors have held on the card since `reset_peak`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def weights_bytes(*modules: torch.nn.Module) -> int:
    """Memory of modules' parameters and buffers, shared ones once."""
    tensors = {id(t): t for module in modules for t in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())
