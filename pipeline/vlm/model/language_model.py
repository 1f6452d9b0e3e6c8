"""The language model: any Transformers causal LM, loaded strictly."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.core import ARTEFACT, PipelineError
from pipeline.core.loading import load_pretrained


def hidden_size(language_model: PreTrainedModel) -> int:
    """D: read off the embedding table, since configs of different families name it differently."""
    table: Any = language_model.get_input_embeddings().weight
    return int(table.shape[1])


def load_language_model(model: str, *, revision: str = "", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Any Transformers causal LM, strictly: a missing weight is an error, never a random one."""
    language_model, info = load_pretrained(
        AutoModelForCausalLM, model, where="llm.model", revision=revision, dtype=dtype, attn_implementation="sdpa"
    )
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise PipelineError(
                f"{model}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}", where="llm.model", code=ARTEFACT
            )
    return language_model
