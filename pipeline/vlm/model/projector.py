"""The projector: patch features of the vision encoder -> token embeddings of the language model.

Sizes: width is Dv, the encoder's; hidden is D, the language model's.
"""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from pipeline.vlm.model.merge import build_merge


def _linear(width: int, hidden: int) -> nn.Sequential:
    """MiniMind-V, December 2025."""
    return nn.Sequential(nn.Linear(width, hidden))


def _linear_nobias(width: int, hidden: int) -> nn.Sequential:
    """Idefics3, SmolVLM and nanoVLM, behind a shuffle."""
    return nn.Sequential(nn.Linear(width, hidden, bias=False))


def _mlp(width: int, hidden: int) -> nn.Sequential:
    """LLaVA-1.5 (arXiv 2310.03744), with the tanh form of GELU, which Transformers, vLLM and llama.cpp share."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, hidden))


def _mlp3x(width: int, hidden: int) -> nn.Sequential:
    """LLaVA's `mlp3x_gelu`: a layer more, exact GELU."""
    first, second, third = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), third)


def _norm_mlp(width: int, hidden: int) -> nn.Sequential:
    """MiniMind-V, 2026: a LayerNorm first, and exact GELU."""
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
    return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), second)


# What `projector.kind` may be (see also `pipeline.params.schema`). An export refuses a kind that its format has no place for.
PROJECTORS: dict[str, Callable[[int, int], nn.Sequential]] = {
    "linear": _linear,
    "linear_nobias": _linear_nobias,
    "mlp": _mlp,
    "mlp3x": _mlp3x,
    "norm_mlp": _norm_mlp,
}


def build_projector(kind: str, width: int, hidden: int, merge: str = "none", factor: int = 1) -> nn.Sequential:
    """Patch features [S, P, Dv] -> token embeddings [S, P / factor², D]; ValueError for a kind or merge that there is not.

    Merging has no weights and the layers keep their numbers, so a projector's tensors are named alike with and without it.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"unknown projector kind {kind!r}")
    merging, wide = build_merge(merge, factor, width)
    layers = PROJECTORS[kind](wide, hidden)
    if merging is None:
        return layers
    return nn.Sequential(OrderedDict([("merge", merging), *layers.named_children()]))
