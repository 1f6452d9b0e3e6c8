"""Which device and number format to compute in: read from the hardware, never from a name."""

import os
import resource
import sys
from pathlib import Path

import torch

from pipeline.core.errors import PipelineError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(requested: str) -> torch.device:
    """`auto` is the first GPU, else the CPU; a device that is asked for and absent is an error, never a silent CPU run."""
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(requested)
    missing = (device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count())) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise PipelineError(f"runtime.device is {requested}, which this machine lacks", remedy="set runtime.device: auto")
    return device


def pick_precision(requested: str, device: torch.device) -> str:
    """`auto` is bfloat16 where the hardware multiplies it natively, float16 on older GPUs, float32 elsewhere."""
    if requested == "float16" and device.type == "cpu":
        raise PipelineError("precision float16 needs a GPU", remedy="set precision: auto")
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bfloat16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "float32"
    return "float32"


def pick_batch(requested: int | str, device: torch.device) -> int:
    """Images per encoder call. `auto`: 256 on a GPU, which smaller ones leave idle; 16 on a CPU, where more gain nothing."""
    if requested != "auto":
        return int(requested)
    return 16 if device.type == "cpu" else 256


def pick_workers(requested: int | str, *, processes: int = 1) -> int:
    """Decoding processes of each of so many. `auto`: the cores this process may use but two, at least 2."""
    if requested != "auto":
        return int(requested)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, (cores - 2) // processes)


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context for forward passes: float32 switches autocast off."""
    dtype = DTYPES[precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory this process has held: on the GPU where one is used, else resident memory. In GB (1e9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would be the parent's, where that was larger
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(held.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def use_device(device: torch.device) -> None:
    """Make a GPU that is named by number the one that libraries take when they ask for any."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def numbered(device: torch.device) -> torch.device:
    """A device with its number: `cuda` is the GPU that is current."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def use_fast_float32() -> None:
    """Float32 as float32 everywhere, and as fast as that goes.

    On GPUs convolutions would else be TF32, with 10 bits of mantissa. On CPUs matrix products run through
    oneDNN, which takes half the time of MKL on current ones: "medium" stays true float32 there (error 4e-7 measured), except
    with AMX, where it would compute in bfloat16.
    """
    torch.backends.cudnn.allow_tf32 = False
    if not torch.cuda.is_available() and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
