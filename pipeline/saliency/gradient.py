"""Which pixels a word hangs on: the size of the gradient of its log odds (Simonyan et al. 2013, arXiv 1312.6034), patch by patch.

The gradient runs through language model, projector and encoder to the pixels, so it needs no attention weights and takes any
family. Log odds, and not the probability, because that of a word the model is sure of hardly moves.
Shapes: S pictures, A tokens of the answer, V vocabulary, W words.
"""

from collections.abc import Callable, Sequence

import torch


def log_odds(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of each token against all others: logits [A, V], ids [A] -> [A]."""
    others = logits.float().scatter(1, ids[:, None], float("-inf")).logsumexp(1)
    return logits.float().gather(1, ids[:, None])[:, 0] - others


def gradient_maps(
    odds_of: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor, words: Sequence[range], grid: int
) -> torch.Tensor:
    """float32 [W, S, grid, grid]: the norm of the gradient within each patch.

    Args:
        odds_of: pixels float32 [S, 3, side, side] -> log odds [A].
        words: which of the A tokens make each word.
    """
    pixels = pixels.float().requires_grad_()
    with torch.enable_grad():
        odds = odds_of(pixels)
        found = []
        for number, word in enumerate(words):
            (of_pixels,) = torch.autograd.grad(
                odds[word.start : word.stop].sum(), pixels, retain_graph=number + 1 < len(words), allow_unused=True
            )
            found.append(torch.zeros_like(pixels) if of_pixels is None else of_pixels)
    side = pixels.shape[-1] // grid  # of a patch; a rest at the edge is in none
    inside = torch.stack(found)[..., : grid * side, : grid * side].unflatten(-2, (grid, side)).unflatten(-1, (grid, side))
    return inside.pow(2).sum(dim=(2, 4, 6)).sqrt().detach()  # of [W, S, 3, grid, side, grid, side]
