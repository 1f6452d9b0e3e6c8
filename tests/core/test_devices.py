"""Devices and number formats: read from the hardware, and never a silent fallback."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from pipeline.core.devices import (
    DTYPES,
    autocast,
    peak_memory_gb,
    pick_batch,
    pick_device,
    pick_precision,
    pick_workers,
    use_fast_float32,
)
from pipeline.core.errors import PipelineError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def test_auto_is_the_gpu_where_there_is_one_and_cpu_is_always_to_be_had() -> None:
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["cuda:99", pytest.param("cuda", marks=no_gpu), pytest.param("cuda:0", marks=no_gpu), "mps"])
def test_a_device_that_is_asked_for_and_absent_is_an_error_that_names_it(name: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(PipelineError, match=rf"runtime\.device is {name}, .*auto"):
        pick_device(name)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_precision_that_is_asked_for_is_given(name: str) -> None:
    assert pick_precision(name, CPU) == pick_precision(name, CUDA) == name
    assert pick_precision("float16", CUDA) == "float16"


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(PipelineError, match="float16 needs a GPU"):
        pick_precision("float16", CPU)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, "float32"), ({"avx512_f": True}, "float32"), ({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16")],
)
def test_auto_on_a_cpu_is_what_the_cpu_multiplies_natively(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)  # this machine is only one of them
    assert pick_precision("auto", CPU) == expected


def test_auto_on_this_machine_agrees_with_proc_cpuinfo() -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists() or "flags" not in info.read_text():
        pytest.skip("no x86 Linux")
    native = bool({"avx512_bf16", "amx_bf16"} & set(info.read_text().split()))
    assert pick_precision("auto", CPU) == ("bfloat16" if native else "float32")


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_autocast_computes_in_the_precision_it_names(name: str) -> None:
    warnings.simplefilter("error")
    weights = torch.ones(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast(name, CPU):
        assert (weights @ weights).dtype == DTYPES[name]


def test_peak_memory_is_the_largest_this_process_has_held_in_gb() -> None:
    before = peak_memory_gb(CPU)
    held = torch.ones(100_000_000, dtype=torch.uint8)  # 0.1 GB, every page touched
    after = peak_memory_gb(CPU)
    assert after >= before
    assert after > held.numel() / 1e9
    if sys.platform == "linux":
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        assert after == pytest.approx(int(status["VmHWM"].split()[0]) * 1024 / 1e9, rel=0.05)


def test_auto_follows_the_device_and_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [pick_batch("auto", torch.device(name)) for name in ("cpu", "cuda")] == [16, 256]
    assert pick_batch(7, torch.device("cuda")) == 7
    for cores, processes, workers in ((1, 1, 2), (2, 1, 2), (16, 1, 14), (64, 8, 7)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert pick_workers("auto", processes=processes) == workers
    assert pick_workers(0) == 0


def test_float32_is_float32_in_convolutions_too() -> None:
    use_fast_float32()
    assert not torch.backends.cudnn.allow_tf32
