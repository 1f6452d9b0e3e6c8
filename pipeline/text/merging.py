"""How many placeholder tokens stand for an image whose patches are merged before the projector (`projector.factor`)."""

from math import isqrt

from pipeline.core import PipelineError

FACTORS = range(1, 5)


def image_tokens(patches: int, factor: int) -> int:
    """P patches, factor x factor of them in one token -> P / factor².

    Raises `PipelineError` naming the factors that the grid has, where this one does not divide it.
    """
    side = isqrt(patches)
    if side * side != patches and factor > 1:
        raise PipelineError(f"{patches} patches are no square grid", where="projector.factor", remedy="set projector.merge: none")
    if side % factor:
        fit = [number for number in FACTORS if side % number == 0]
        raise PipelineError(
            f"a grid of {side} × {side} patches cannot be merged {factor} × {factor}",
            where="projector.factor",
            remedy=f"set it to {', '.join(map(str, fit[:-1]))} or {fit[-1]}" if len(fit) > 1 else "set projector.merge: none",
        )
    return patches // factor**2
