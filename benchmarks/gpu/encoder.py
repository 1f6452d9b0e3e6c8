"""Vision towers alone, pixels and features on the device: eager and compiled, and the pipeline's encoder from host to host.

The plain tower has bfloat16 weights, as the kindest live side of the training sections has it.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.ceilings import product_rate
from benchmarks.gpu.clock import first_call, seconds_a_call, spread
from benchmarks.gpu.runner import Figures, Setting, guarded
from benchmarks.gpu.shapes import TOWERS, make_tower, patches, picture_flops, tower_config
from benchmarks.gpu.world import PICTURES, Bench

BATCHES, TINY_BATCHES = (256, 64), (4, 2)  # compiled is only the first


class PlainTower(nn.Module):
    """A tower as a trainer would have it: uint8 pixels in, bfloat16 hidden states of the patches out.

    Args:
        mean, std: of the pixels as numbers from 0 to 1, three each.
    """

    def __init__(
        self,
        config: Any,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        *,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.tower: Any = make_tower(config, device, dtype)
        self.patches = patches(config)
        self._dtype = dtype
        self._mean, self._std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (mean, std))

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [I, 3, side, side] -> [I, P, Dv]."""
        values = (pixels.float() - self._mean) / self._std
        hidden: torch.Tensor = self.tower(pixel_values=values.to(self._dtype)).last_hidden_state
        return hidden[:, hidden.shape[1] - self.patches :]

    def layers(self) -> list[nn.Module]:
        """Its transformer layers, which are all alike."""
        return list(next(module for module in self.tower.modules() if isinstance(module, nn.ModuleList)))


Forward = Callable[..., Any]


def own_code(plain: Forward) -> Forward:
    """The same function under code of its own.

    The compiler remembers by a function's code which sizes it has met, so layers of one class in two models, or on two sides,
    would make each other's sizes variable.
    """

    def tower_layer(*args: Any, **options: Any) -> Any:
        return plain(*args, **options)

    return tower_layer


def set_compiled(
    layers: list[nn.Module], on: bool, device: torch.device, *, own: Callable[[Forward], Forward], dynamic: bool | None
) -> None:
    """Compile layers in place, one program for all; on a CPU they are only traced, which takes no compiler's minutes."""
    for layer in layers:
        if on:
            backend = "inductor" if device.type == "cuda" else "eager"
            layer.forward = torch.compile(own(layer.forward), backend=backend, dynamic=dynamic)
        elif "forward" in layer.__dict__:
            del layer.forward


def measure(setting: Setting) -> Iterator[Figures]:
    """Images/s and useful TFLOP/s of every tower, batch and way."""
    limit = product_rate(setting)
    yield {"product_tflops": round(limit / 1e12, 1)}
    for name in TOWERS:
        config: Any = tower_config(name, tiny=setting.tiny)
        yield {name: {"gflop_per_image": round(picture_flops(config) / 1e9, 3)}}
        tower = PlainTower(config, setting.device)
        batches = TINY_BATCHES if setting.tiny else BATCHES
        for batch in batches:
            yield {name: guarded(f"eager, {batch}", partial(_plain, setting, tower, config, batch, limit))}
        yield {name: guarded(f"compiled, {batches[0]}", partial(_compiled, setting, tower, config, batches[0], limit))}
        del tower
        if name in PICTURES:
            yield {name: guarded("ours, host to host", partial(_ours, setting, name, limit))}


def _pixels(config: Any, batch: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), dtype=torch.uint8, device=device)


def _plain(setting: Setting, tower: PlainTower, config: Any, batch: int, limit: float) -> Figures:
    pixels, seconds = _pixels(config, batch, setting.device), 0.05 if setting.tiny else 1.0
    return _rates(seconds_a_call(lambda: tower(pixels), setting.device, seconds=seconds), batch, config, limit)


def _compiled(setting: Setting, tower: PlainTower, config: Any, batch: int, limit: float) -> Figures:
    pixels = _pixels(config, batch, setting.device)
    torch.compiler.reset()  # what another tower's layers were would count against this one's
    set_compiled(tower.layers(), True, setting.device, own=own_code, dynamic=False)
    compiling = first_call(lambda: tower(pixels), setting.device)
    return _plain(setting, tower, config, batch, limit) | {"compile_seconds": round(compiling, 1)}


def _ours(setting: Setting, name: str, limit: float) -> Figures:
    """The pipeline's encoder, its batch: pixels in host memory to rows in host memory."""
    encoder, config = Bench(setting).encoder(name), tower_config(name, tiny=setting.tiny)
    pixels = torch.from_numpy(np.zeros((encoder.batch, 3, config.image_size, config.image_size), np.uint8))  # type: ignore[attr-defined]
    names = ["picture"] * encoder.batch
    first = first_call(lambda: encoder.encode_rows(pixels, names).cpu(), setting.device)
    spent = seconds_a_call(lambda: encoder.encode_rows(pixels, names).cpu(), setting.device, seconds=0.05 if setting.tiny else 1.0)
    return _rates(spent, encoder.batch, config, limit) | {"batch": encoder.batch, "first_call_seconds": round(first, 1)}


def _rates(spent: list[float], batch: int, config: Any, limit: float) -> Figures:
    rates = spread(batch / each for each in spent)
    useful = rates["median"] * picture_flops(config)
    return {"images_per_second": rates, "tflops": round(useful / 1e12, 2), "share_of_product": round(useful / limit, 3)}
