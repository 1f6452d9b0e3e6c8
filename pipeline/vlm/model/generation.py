"""Prompts and patch features -> generated token ids: what evaluation and chat share."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import GenerationConfig

from pipeline.text import PromptBuilder
from pipeline.vlm.model.probing import takes_padding
from pipeline.vlm.model.roles import output_head
from pipeline.vlm.model.vlm import VisionLanguageModel

GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@torch.no_grad()  # not inference mode: a model that goes on training afterwards must not keep a tensor of it
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
    """Continue prompts (ids [T] each, left-padded together, or those of one length where a language model does not take
    padding); returns ids [B, new], end-of-turn tokens behind each answer.

    Args:
        image_starts: where each prompt's images begin; features: [S, P, Dv], theirs in the same order.
        options: passed to Transformers' `generate`; greedy without any.
    """
    if len({len(ids) for ids in prompts}) > 1 and not takes_padding(model.language_model):
        return _by_length(model, builder, prompts, image_starts, features, max_new_tokens=max_new_tokens, device=device, **options)
    width = max(len(ids) for ids in prompts)
    padded, mask = np.zeros((2, len(prompts), width), np.int64)
    for i, ids in enumerate(prompts):
        padded[i, width - len(ids) :] = ids
        mask[i, width - len(ids) :] = 1
    row = np.repeat(np.arange(len(prompts)), [len(starts) for starts in image_starts])
    shifted = [np.asarray(starts, np.int64) + width - len(ids) for ids, starts in zip(prompts, image_starts, strict=True)]
    tokens, rows, begins = (torch.from_numpy(array).to(device) for array in (padded, row, np.concatenate(shifted)))
    language_model: Any = model.language_model
    embedded = model.embed(tokens, features.to(device), rows, begins)
    whole = _whole_states(language_model)
    habits = language_model.generation_config  # a model's own penalties and sampling are not asked for here
    language_model.generation_config = GenerationConfig()
    try:
        with _prompt(language_model, tokens, embedded, options.get("streamer")) as (prompt, skip):
            produced = language_model.generate(
                **prompt,
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
    return produced[:, skip:].cpu().numpy()


def _by_length(
    model: VisionLanguageModel,
    builder: PromptBuilder,
    prompts: Sequence[np.ndarray],
    image_starts: Sequence[Sequence[int] | np.ndarray],
    features: torch.Tensor,
    **options: Any,
) -> np.ndarray:
    """As `generate`, prompts of one length at a time."""
    shown = np.repeat(np.arange(len(prompts)), [len(starts) for starts in image_starts])  # [S]
    lengths = np.array([len(ids) for ids in prompts])
    parts: list[tuple[list[int], np.ndarray]] = []
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length).tolist()
        own = torch.from_numpy(np.flatnonzero(np.isin(shown, rows)))
        some = [prompts[row] for row in rows], [image_starts[row] for row in rows], features[own.to(features.device)]
        parts.append((rows, generate(model, builder, *some, **options)))
    answers = np.full((len(prompts), max(found.shape[1] for _, found in parts)), builder.end_id, np.int64)
    for rows, found in parts:
        answers[rows, : found.shape[1]] = found
    return answers


@contextmanager
def _prompt(
    language_model: Any, ids: torch.Tensor, embedded: torch.Tensor, streamer: Any
) -> Iterator[tuple[dict[str, torch.Tensor], int]]:
    """What `generate` is given for a prompt [B, T, D], and how many ids of it come back before the answer.

    Families whose `generate` takes no embeddings are given ids, and the embedding table's answer to the prompt is replaced.
    """
    if "inputs_embeds" in inspect.signature(language_model.prepare_inputs_for_generation).parameters:
        yield {"inputs_embeds": embedded}, 0
        return
    width = ids.shape[1]

    def spliced(_: Any, __: Any, made: torch.Tensor) -> torch.Tensor:
        """Steps behind the prompt ask for one token, or without a cache for all so far."""
        return made if made.shape[1] < width else torch.cat([embedded.to(made.dtype), made[:, width:]], 1)

    if streamer is not None:
        streamer.skip_prompt = True
    hook = language_model.get_input_embeddings().register_forward_hook(spliced)
    try:
        yield {"input_ids": ids}, width
    finally:
        hook.remove()


def _whole_states(language_model: Any) -> RemovableHandle:
    """Have the vocabulary projection take the last token's states [B, 1, D] as a copy and not as a view into [B, T, D].

    For a view torch multiplies row by row, and on a CPU copies a frozen bfloat16 matrix [V, D] for each of them: 14 GB for 256
    prompts to SmolLM2-135M, and a hundred times the time.
    """
    head = output_head(language_model)
    return head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
