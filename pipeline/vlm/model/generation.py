"""Prompts and patch features -> generated token ids: what evaluation and chat share."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig

from pipeline.text import PromptBuilder
from pipeline.vlm.model.vlm import VisionLanguageModel

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.inference_mode()
def generate(
    model: VisionLanguageModel,
    builder: PromptBuilder,
    prompts: Sequence[np.ndarray],
    image_starts: Sequence[Sequence[int] | np.ndarray],
    features: torch.Tensor,
    *,
    max_new_tokens: int,
    device: torch.device,
    **options: Any,
) -> np.ndarray:
    """Continue prompts (ids [T] each, left-padded together); returns ids [B, new], end-of-turn tokens behind each answer.

    Args:
        image_starts: where each prompt's images begin; features: [S, P, Dv], theirs in the same order.
        options: passed to Transformers' `generate`; greedy without any.
    """
    width = max(len(ids) for ids in prompts)
    padded, mask = np.zeros((2, len(prompts), width), np.int64)
    for i, ids in enumerate(prompts):
        padded[i, width - len(ids) :] = ids
        mask[i, width - len(ids) :] = 1
    row = np.repeat(np.arange(len(prompts)), [len(starts) for starts in image_starts])
    shifted = [np.asarray(starts, np.int64) + width - len(ids) for ids, starts in zip(prompts, image_starts, strict=True)]
    tokens, rows, begins = (torch.from_numpy(array).to(device) for array in (padded, row, np.concatenate(shifted)))
    language_model: Any = model.language_model
    whole = _whole_states(language_model)
    habits = language_model.generation_config  # a model's own penalties and sampling are not asked for here
    language_model.generation_config = GenerationConfig()
    try:
        produced = language_model.generate(
            inputs_embeds=model.embed(tokens, features.to(device), rows, begins),
            attention_mask=torch.from_numpy(mask).to(device),
            max_new_tokens=max_new_tokens,
            eos_token_id=builder.end_id,
            pad_token_id=builder.end_id,
            suppress_tokens=builder.suppressed,
            **(options or GREEDY),
        )
    finally:
        whole.remove()
        language_model.generation_config = habits
    return produced.cpu().numpy()


def _whole_states(language_model: Any) -> RemovableHandle:
    """Have the vocabulary projection take the last token's states [B, 1, D] as a copy and not as a view into [B, T, D].

    For a view torch multiplies row by row, and on a CPU copies a frozen bfloat16 matrix [V, D] for each of them: 14 GB for 256
    prompts to SmolLM2-135M, and a hundred times the time.
    """
    head = language_model.get_output_embeddings()
    return head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
