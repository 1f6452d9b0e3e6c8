"""What the machine itself can do: copies on the card and to it, and bfloat16 products. Shares are of these."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.clock import seconds_a_call, spread
from benchmarks.gpu.runner import Figures, Setting
from benchmarks.gpu.shapes import MODELS, TOWERS, llm_config, tower_config

SIDE, TINY_SIDE = 8192, 256
COPIED, TINY_COPIED = 1 << 30, 1 << 20  # bytes
TOKENS = 64 * 264  # of a step of 64 rows with 196 patches


def measure(setting: Setting) -> Iterator[Figures]:
    """GB/s of copies, TFLOP/s of products."""
    device, seconds = setting.device, 0.1 if setting.tiny else 0.5
    yield {"gb_per_second": _copies(device, TINY_COPIED if setting.tiny else COPIED, seconds)}
    rate = product_rates(device, (_side(setting),) * 3, seconds)
    yield {"product_tflops": {f"{_side(setting)}^3": spread(value / 1e12 for value in rate)}}
    for name, shape in _real_shapes(tiny=setting.tiny).items():
        found = product_rates(device, shape, seconds / 2)
        yield {"product_tflops": {f"{name} {'x'.join(map(str, shape))}": spread(value / 1e12 for value in found)}}


def _side(setting: Setting) -> int:
    return TINY_SIDE if setting.tiny else SIDE


def product_rate(setting: Setting) -> float:
    """Operations a second of the square bfloat16 product, the median: what shares are of."""
    side = _side(setting)
    return statistics.median(product_rates(setting.device, (side, side, side), 0.1 if setting.tiny else 0.4))


def product_rates(device: torch.device, shape: tuple[int, int, int], seconds: float) -> list[float]:
    """Operations a second of a bfloat16 product [rows, inner] x [inner, columns], in each group of calls."""
    rows, inner, columns = shape
    a = torch.randn(rows, inner, dtype=torch.bfloat16, device=device)
    b = torch.randn(columns, inner, dtype=torch.bfloat16, device=device).t()  # as a linear layer holds its weight
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    return [
        2 * rows * inner * columns / spent for spent in seconds_a_call(lambda: torch.mm(a, b, out=out), device, seconds=seconds)
    ]


def _real_shapes(*, tiny: bool) -> dict[str, tuple[int, int, int]]:
    """Each model's largest product in a step: tokens, width, inner width of its feed-forward block."""
    found = {}
    for name in MODELS:
        config: Any = llm_config(name, tiny=tiny)
        found[name] = (64 if tiny else TOKENS, config.hidden_size, config.intermediate_size)
    for name in TOWERS:
        tower: Any = tower_config(name, tiny=tiny)
        seen = (tower.image_size // tower.patch_size) ** 2
        found[name] = ((2 if tiny else 256) * seen, tower.hidden_size, tower.intermediate_size)
    return found


def _copies(device: torch.device, size: int, seconds: float) -> dict[str, Any]:
    """Bytes a second: on the device each byte is read and written, and both count; between host and card each counts once."""
    a, b = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    sides = {
        "device copy": (2, lambda: b.copy_(a)),
        "pinned host to device": (1, lambda: a.copy_(pinned, non_blocking=True)),
        "device to pinned host": (1, lambda: pinned.copy_(a, non_blocking=True)),
    }
    return {
        name: spread(times * size / spent / 1e9 for spent in seconds_a_call(work, device, seconds=seconds))
        for name, (times, work) in sides.items()
    }
