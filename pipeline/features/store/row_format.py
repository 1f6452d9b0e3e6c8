"""How a row of patch features lies on disk: as float16, or as int8 codes with a scale a patch at half the size.

int8: a channel is centred and divided by its spread (so that the few strong channels of a trained encoder do not take
the range of all others), then a patch's values are divided by its largest. Measured error: see docs/features.md.
The channels' centres and spreads follow from the encoder alone, so a row's bytes depend on its image and encoder only.
"""

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

BLOCK = 512  # bytes that an int8 row is a multiple of: a row stays one aligned read


class RowFormat(Protocol):
    """A row's form on disk. `shape` and `dtype` are one row's; `constants` are stored once in every shard."""

    shape: tuple[int, ...]
    dtype: np.dtype
    constants: dict[str, np.ndarray]

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        """float32 or float16 [n, P, Dv] -> what is stored, [n, *shape], on the same device."""
        ...

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """What is stored -> float16 [n, P, Dv], on the same device."""
        ...


class Float16Format:
    """The default: 0.02 % rounding error, no work to read."""

    def __init__(self, tokens: int, width: int) -> None:
        self.shape: tuple[int, ...] = (tokens, width)
        self.dtype: np.dtype = np.dtype("<f2")
        self.constants: dict[str, np.ndarray] = {}

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        return features.to(torch.float16)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        return stored


class Int8Format:
    """P × Dv codes, then P float16 scales, then zeros up to a multiple of 512 bytes.

    Args:
        tokens: P.
        mean, spread: float32 [Dv], a channel's centre and standard deviation.
    """

    def __init__(self, tokens: int, mean: np.ndarray, spread: np.ndarray) -> None:
        self._tokens, self._width = tokens, len(mean)
        size = tokens * self._width + 2 * tokens
        self._padding = -size % BLOCK
        self.shape: tuple[int, ...] = (size + self._padding,)
        self.dtype: np.dtype = np.dtype("|u1")
        self.constants = {"channel_mean": mean.astype("<f4"), "channel_spread": spread.astype("<f4")}
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def _constants(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._on:
            mean, spread = (torch.from_numpy(self.constants[name]).to(device) for name in ("channel_mean", "channel_spread"))
            self._on[device] = mean, spread
        return self._on[device]

    def encode(self, features: torch.Tensor) -> torch.Tensor:
        mean, spread = self._constants(features.device)
        white = (features.float() - mean) / spread
        scale = (white.abs().amax(2, keepdim=True) / 127).to(torch.float16)  # inf or nan here: refused by the encoder
        divisor = scale.float().clamp_min(torch.finfo(torch.float16).tiny)
        codes = (white / divisor).round().clamp(-127, 127).to(torch.int8)
        parts = [codes.flatten(1).view(torch.uint8), scale.flatten(1).view(torch.uint8)]
        return torch.cat([*parts, parts[0].new_zeros(len(features), self._padding)], dim=1)

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        mean, spread = self._constants(stored.device)
        end = self._tokens * self._width
        codes = stored[:, :end].view(torch.int8).unflatten(1, (self._tokens, self._width))
        scale = stored[:, end : end + 2 * self._tokens].clone().view(torch.float16).float()[..., None]
        out = torch.empty(codes.shape, dtype=torch.float16, device=stored.device)
        step = 4 if stored.device.type == "cpu" else max(1, len(stored))  # what stays in a processor's cache
        held = torch.empty(min(step, len(stored)), *codes.shape[1:], device=stored.device)
        for start in range(0, len(stored), step):
            part = slice(start, start + step)
            values = torch.mul(codes[part], scale[part], out=held[: len(codes[part])])
            out[part] = values.mul_(spread).add_(mean)
        return out


def row_format_of(spec: Mapping[str, Any], constants: Mapping[str, np.ndarray]) -> RowFormat:
    """The rows that an encoder's spec describes; raises ValueError when the constants are not the ones it names."""
    if spec.get("storage", "float16") == "float16":
        return Float16Format(spec["tokens"], spec["width"])
    if spec["storage"] != "int8" or constants_digest(constants) != spec["constants"]:
        raise ValueError(f"storage {spec['storage']!r} is unknown or its constants are not those of the encoder")
    return Int8Format(spec["tokens"], constants["channel_mean"], constants["channel_spread"])


def constants_digest(constants: Mapping[str, np.ndarray]) -> str:
    """Hash of the stored constants, part of the encoder's spec."""
    found = hashlib.sha256()
    for name, values in sorted(constants.items()):
        found.update(f"{name}:{values.dtype.str}:{values.shape};".encode() + values.tobytes())
    return found.hexdigest()[:32]


def calibration_pictures(size: int, count: int = 16) -> np.ndarray:
    """Fixed pictures uint8 [count, 3, size, size]: half like photographs, half like drawings, charts and documents.

    The first are noise whose amplitude falls as 1/f, the spectrum of natural images (Field 1987), in colours that vary
    together; the second are flat areas with sharp edges.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(count // 2, 3, size, size))) / frequency, s=(size, size))
    noise += 2 * noise.mean(1, keepdims=True)
    noise *= 60 / noise.std(axis=(1, 2, 3), keepdims=True)
    noise += rng.uniform(90, 160, (len(noise), 1, 1, 1))
    flat = np.broadcast_to(rng.uniform(0, 255, (count - len(noise), 3, 1, 1)), (count - len(noise), 3, size, size)).copy()
    for picture in flat:
        for _ in range(int(rng.integers(1, 5))):
            x, y, width, height = rng.integers(size // 16, size // 2, 4)
            picture[:, y : y + height, x : x + width] = rng.uniform(0, 255, (3, 1, 1))
    return np.clip(np.concatenate([noise, flat]), 0, 255).astype(np.uint8)


def measure_constants(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, float32 [Dv] each, of features [n, P, Dv].

    Rounded to 6 significant bits, which costs nothing in exactness: another processor's last bits give the same constants.
    """
    values = features.double().flatten(0, 1)
    mean, spread = values.mean(0), values.std(0).clamp_min(1e-3)
    return _coarse(mean).numpy(), _coarse(spread).numpy()


def _coarse(values: torch.Tensor) -> torch.Tensor:
    fraction, exponent = torch.frexp(values)
    return torch.ldexp((fraction * 64).round() / 64, exponent).float()
