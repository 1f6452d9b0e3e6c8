"""int8 features: half the disk of float16 at about half a percent of error.

A few channels of a vision transformer are tens of times larger than the rest, so one scale for all of them wastes the
range. Each channel is therefore whitened (its mean taken off, divided by its deviation) with constants of the encoder,
then each token is scaled to use all of int8. The constants come from fixed synthetic pictures, not from the data set:
a row's bytes depend on its image and the encoder alone, so rows can be added, removed and shared between data sets.

A row record is P × Dv int8 codes, then P float16 scales, padded to whole sectors.
"""

import hashlib

import numpy as np
import torch

SECTOR = 512
CALIBRATION = 256  # synthetic pictures


class Whitening:
    """Channel constants float32 [Dv]: `mean` and `deviation`."""

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        self.mean, self.deviation = mean.astype("<f4"), deviation.astype("<f4")

    def digest(self) -> str:
        """Identity of the constants: part of the features' fingerprint."""
        return hashlib.sha256(self.mean.tobytes() + self.deviation.tobytes()).hexdigest()[:16]


def record_bytes(tokens: int, width: int) -> int:
    """Size of a row: codes and scales, rounded up to whole sectors."""
    return -(-(tokens * width + 2 * tokens) // SECTOR) * SECTOR


def synthetic_pixels(size: int, count: int = CALIBRATION) -> np.ndarray:
    """uint8 [count, 3, size, size]: smooth colour fields of several scales with hard-edged shapes, the same everywhere."""
    rng = np.random.default_rng(20_26)
    pictures = np.empty((count, 3, size, size), np.uint8)
    y, x = np.mgrid[0:size, 0:size] / size
    for picture in pictures:
        field = np.zeros((3, size, size))
        for waves in (1, 2, 4, 8, 16):
            angle, phase = rng.uniform(0, 2 * np.pi, (2, 3, 1, 1))
            field += rng.uniform(0, 1) * np.sin(2 * np.pi * waves * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        field = 127 + 60 * field / (np.abs(field).max() + 1e-6) * rng.uniform(0.2, 2) + rng.uniform(-60, 60, (3, 1, 1))
        for _ in range(rng.integers(0, 4)):
            (cx, cy), r = rng.uniform(0, 1, 2), rng.uniform(0.05, 0.4)
            inside = (x - cx) ** 2 + (y - cy) ** 2 < r * r if rng.random() < 0.5 else (abs(x - cx) < r) & (abs(y - cy) < r)
            field[:, inside] = rng.uniform(0, 255, (3, 1))
        picture[:] = np.clip(field + rng.normal(0, rng.uniform(0, 12), field.shape), 0, 255)
    return pictures


def whitening_of(features: torch.Tensor) -> Whitening:
    """Channel constants of patch features [I, P, Dv]."""
    values = features.float().flatten(0, 1)
    return Whitening(values.mean(0).numpy(), values.std(0).clamp_min(1e-6).numpy())


def quantise(features: np.ndarray, whitening: Whitening) -> np.ndarray:
    """float16 [n, P, Dv] -> records uint8 [n, record_bytes]."""
    count, tokens, width = features.shape
    white = (features.astype(np.float32) - whitening.mean) / whitening.deviation
    scale = (np.abs(white).max(2) / 127).astype(np.float16)  # [n, P]
    scale = np.maximum(scale, np.float16(6e-8))
    codes = np.clip(np.rint(white / scale.astype(np.float32)[..., None]), -127, 127).astype(np.int8)
    records = np.zeros((count, record_bytes(tokens, width)), np.uint8)
    records[:, : tokens * width] = codes.reshape(count, -1).view(np.uint8)
    records[:, tokens * width : tokens * width + 2 * tokens] = scale.view(np.uint8).reshape(count, -1)
    return records


def dequantise(records: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor, tokens: int) -> torch.Tensor:
    """Records uint8 [n, record_bytes] -> float16 [n, P, Dv], on the device the records are on."""
    width = len(mean)
    codes = records[:, : tokens * width].view(torch.int8).view(-1, tokens, width)
    scale = records[:, tokens * width : tokens * width + 2 * tokens].contiguous().view(torch.float16)  # [n, P]
    return (codes.float() * scale.float()[..., None] * deviation + mean).to(torch.float16)
