"""A language model's large matrices once more in float16, as FBGEMM lays them out, for one answer on a CPU.

An answer reads every matrix once a token, so that its bytes are what it costs. FBGEMM multiplies float32 states by float16
matrices and adds up in float32: half the bytes, at 2e-4 of a product, where bfloat16 for both would be at 3e-3. It runs on any
x86 processor of the last ten years. The model itself stays as it is for whoever looks back through it or answers many at once.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

SMALLEST = 1 << 17  # numbers in a matrix that gains: a smaller one, 512 kB in float32, stays in a core's cache as it is
ROWS = 4096  # packed together: FBGEMM walks down the columns, and more rows than this do not stay in a cache meanwhile
LARGEST = torch.finfo(torch.float16).max

Packed = dict[nn.Linear, Callable[[torch.Tensor], torch.Tensor]]


def pack(model: nn.Module) -> Packed:
    """What takes the place of each large linear layer's forward: float32 [..., in] -> [..., out]; none without FBGEMM."""
    if torch.backends.quantized.engine not in ("x86", "fbgemm"):
        return {}
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and _gains(layer)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        made = {layer: [pool.submit(torch.ops.quantized.linear_prepack_fp16, *part) for part in _parts(layer)] for layer in layers}
        return {layer: partial(_multiply, [part.result() for part in parts]) for layer, parts in made.items()}


def _gains(layer: nn.Linear) -> bool:
    large = type(layer) is nn.Linear and layer.weight.numel() >= SMALLEST and "forward" not in vars(layer)
    return large and bool(layer.weight.detach().abs().max() < LARGEST)


def _parts(layer: nn.Linear) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of so many outputs at a time."""
    weights = layer.weight.detach().split(ROWS)
    return zip(weights, [None] * len(weights) if layer.bias is None else layer.bias.detach().split(ROWS), strict=True)


def _multiply(parts: list[Any], states: torch.Tensor) -> torch.Tensor:
    made = [torch.ops.quantized.linear_dynamic_fp16(states, part) for part in parts]
    return made[0] if len(made) == 1 else torch.cat(made, -1)


@contextmanager
def using(packed: Packed) -> Iterator[None]:
    """The layers multiply by their packed matrices within; no gradient goes through those."""
    for layer, forward in packed.items():
        layer.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for layer in packed:
            del layer.forward
