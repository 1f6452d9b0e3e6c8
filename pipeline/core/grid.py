"""A square grid of patches, f x f neighbours of which become one token. Shapes: I images, P patches row by row, Dv width."""

from math import isqrt
from typing import TYPE_CHECKING

from pipeline.core.errors import PipelineError

if TYPE_CHECKING:
    import torch

FACTORS = range(1, 5)


def merged_tokens(patches: int, factor: int, *, where: str = "projector.factor", off: str = "projector.merge: none") -> int:
    """P patches, f x f of them in one token -> P / f².

    Raises `PipelineError` naming the factors that the grid has, where this one does not divide it.
    """
    side = isqrt(patches)
    if side * side != patches and factor > 1:
        raise PipelineError(f"{patches} patches are no square grid", where=where, remedy=f"set {off}")
    if side % factor:
        fit = [number for number in FACTORS if side % number == 0]
        raise PipelineError(
            f"a grid of {side} × {side} patches cannot be merged {factor} × {factor}",
            where=where,
            remedy=f"set it to {', '.join(map(str, fit[:-1]))} or {fit[-1]}" if len(fit) > 1 else f"set {off}",
        )
    return patches // factor**2


def blocks(features: "torch.Tensor", factor: int) -> "torch.Tensor":
    """[I, P, Dv] -> a view [I, rows of blocks, f, blocks in a row, f, Dv]; raises ValueError where f does not divide the grid."""
    images, patches, width = features.shape
    side = isqrt(patches)
    if side * side != patches or side % factor:
        raise ValueError(f"{patches} patches cannot be merged {factor} × {factor}")
    return features.view(images, side // factor, factor, side // factor, factor, width)


def mean_of_blocks(features: "torch.Tensor", factor: int) -> "torch.Tensor":
    """[I, P, Dv] -> [I, P / f², Dv], in the features' number format."""
    return blocks(features, factor).mean(dim=(2, 4)).flatten(1, 2)
