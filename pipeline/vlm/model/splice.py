"""The splice: where an image meets a sentence. Shapes: B rows, T tokens, S images in the batch, P patches, D hidden size."""

import torch


def splice(embeddings: torch.Tensor, features: torch.Tensor, row: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Put projected features where their placeholders stand.

    Args:
        embeddings: [B, T, D] of all tokens, placeholders included.
        features: [S, P, D], one run an image.
        row, start: int64 [S], the row of each run and the position of its first placeholder.

    Returns a new [B, T, D]; gradients flow to both inputs. Raises ValueError when counts do not
    match; that runs lie within their rows is `collate`'s to check, since asking the device here would stall it.
    """
    if not len(features) == len(row) == len(start):
        raise ValueError(f"{len(features)} images' features for {len(row)} runs of placeholders")
    positions = start[:, None] + torch.arange(features.shape[1], device=start.device)  # [S, P]
    return embeddings.index_put((row[:, None].expand_as(positions), positions), features.to(embeddings.dtype))
