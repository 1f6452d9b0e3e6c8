"""The language model: any Transformers causal LM, loaded strictly, and the checksums that say which one it was."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from pipeline.core import ARTEFACT, PipelineError, file_digests, is_signed, verify
from pipeline.core.loading import load_pretrained

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # decide logits and token ids too


def hidden_size(language_model: PreTrainedModel) -> int:
    """D: read off the embedding table, since configs of different families name it differently."""
    table: Any = language_model.get_input_embeddings().weight
    return int(table.shape[1])


def takes_sdpa(language_model: PreTrainedModel) -> bool:
    """Whether its attention is what sdpa computes: scores that are capped (Gemma 2) are not, though Transformers 5.17 lets them."""
    return language_model._supports_sdpa and not getattr(language_model.config, "attn_logit_softcapping", None)


def load_language_model(
    model: str, *, revision: str = "", dtype: torch.dtype = torch.float32, verified: bool = False
) -> PreTrainedModel:
    """Any Transformers causal LM, strictly: a missing weight is an error, never a random one; with sdpa where it has it.

    A folder that lists its files' checksums is verified first, unless it has just been. Raises `PipelineError`.
    """
    if not verified and is_signed(Path(model)):
        remedy = "make the folder anew, or delete its checksums.json where it was changed on purpose"
        verify(Path(model), remedy=remedy, alone=False)  # a tokenizer may have been added
    language_model, info = load_pretrained(AutoModelForCausalLM, model, where="llm.model", revision=revision, dtype=dtype)
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[kind]:
            raise PipelineError(
                f"{model}: {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[0]}", where="llm.model", code=ARTEFACT
            )
    if language_model.config._attn_implementation == "sdpa" and not takes_sdpa(language_model):
        language_model.set_attn_implementation("eager")
    return language_model


def language_model_files(model: str, *, revision: str = "") -> dict[str, str]:
    """xxh3-128 of each file that decides what the language model computes and which ids it is given, by file name."""
    found = {name: path for name in BESIDE if (path := _file(model, name, revision))}
    for name in WEIGHTS:  # the order in which Transformers looks for them
        if (path := _file(model, name, revision)) is None:
            continue
        parts = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())) if path.suffix == ".json" else []
        found |= {name: path, **{part: inner for part in parts if (inner := _file(model, part, revision))}}
        break
    return dict(zip(found, file_digests(list(found.values())), strict=True))


def _file(model: str, name: str, revision: str) -> Path | None:
    """Where a model's file lies on this machine, None where it has none of that name."""
    try:
        found = cached_file(model, name, revision=revision or "main", local_files_only=True)
    except OSError:
        return None
    return Path(found) if found else None
