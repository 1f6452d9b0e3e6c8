"""Token merging: f x f neighbouring patches become one token, after the store and before the projector.

Shapes: S images, P patches in a square grid (row by row), Dv vision width, f the factor.
"""

import torch
from torch import nn

from pipeline.core.grid import blocks, mean_of_blocks


class _Merge(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"


class Shuffle(_Merge):
    """Space to depth: the f x f patches of a block behind each other in the channel, row by row.

    The order of channels is that of Idefics3's `pixel_shuffle` in Transformers (SmolVLM, nanoVLM), so weights can be carried over.
    """

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[S, P, Dv] -> [S, P / f², Dv * f²]."""
        images, patches, width = features.shape
        merged = blocks(features, self.factor).permute(0, 1, 3, 2, 4, 5)
        return merged.reshape(images, patches // self.factor**2, width * self.factor**2)


class Pool(_Merge):
    """The mean of the f x f patches of a block, in the features' number format."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[S, P, Dv] -> [S, P / f², Dv]."""
        return mean_of_blocks(features, self.factor)


def build_merge(merge: str, factor: int, width: int) -> tuple[nn.Module | None, int]:
    """The module that merges, None where nothing is merged, and the width of what it gives; ValueError for an unknown one."""
    if factor == 1 or merge == "none":
        return None, width
    if merge == "shuffle":
        return Shuffle(factor), width * factor**2
    if merge == "pool":
        return Pool(factor), width
    raise ValueError(f"unknown merge {merge!r}")
