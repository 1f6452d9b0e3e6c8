"""The projector: patch features of the vision encoder -> token embeddings of the language model."""

from torch import nn


def build_projector(kind: str, width: int, hidden: int) -> nn.Sequential:
    """Patch features [.., Dv] -> token embeddings [.., D].

    linear: MiniMind-V (Dec 2025). mlp: LLaVA-1.5 (arXiv 2310.03744) with the tanh form of GELU, which Transformers, vLLM
    and llama.cpp share. norm_mlp: MiniMind-V (2026), a LayerNorm first, exact GELU.
    """
    if kind == "linear":
        return nn.Sequential(nn.Linear(width, hidden))
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, hidden)
    if kind == "mlp":
        return nn.Sequential(first, nn.GELU(approximate="tanh"), second)
    if kind == "norm_mlp":
        return nn.Sequential(nn.LayerNorm(width), first, nn.GELU(), second)
    raise ValueError(f"unknown projector kind {kind!r}")
