"""A trained model for llama.cpp: model.gguf (the language model) and mmproj.gguf (vision tower and projector).

What is written is what llama.cpp's LLaVA code (tools/mtmd, projector type `mlp`) computes; where that is not what this
pipeline computes, the export is refused: llama.cpp always applies GELU between two layers, and knows no LayerNorm first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch

from pipeline.core import ARTEFACT, PipelineError
from pipeline.export import idefics3
from pipeline.export.gguf_file import write_file
from pipeline.export.llava import language_tensors, projector_tensors
from pipeline.export.processor import exported_tokenizer
from pipeline.export.source import Source

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
# The towers' activations as llama.cpp has them: its GELU is the tanh form, 0.0005 from the exact one at most.
USES_GELU = {"gelu": True, "gelu_pytorch_tanh": True, "gelu_new": True, "quick_gelu": False}

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
SPLITS = {  # how a byte-level BPE cuts text into words first -> llama.cpp's name for it
    _ENDINGS + _LETTERS + r"|\p{N}" + _REST: "qwen2",
    _ENDINGS + _LETTERS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
}


def write_gguf(source: Source, folder: Path, *, dtype: str) -> list[str]:
    """Write both files and return their names; raises `PipelineError` for what llama.cpp cannot run as it was trained."""
    check_runnable(source)
    _write_model(source, folder / "model.gguf", dtype)
    _write_projector(source, folder / "mmproj.gguf", dtype)
    return ["model.gguf", "mmproj.gguf"]


def check_runnable(source: Source) -> None:
    """Raises `PipelineError` naming the first thing that llama.cpp has no equal for."""
    if idefics3.takes(source):
        raise PipelineError(
            "llama.cpp's idefics3 puts tokens around a picture, and shows it in tiles too, which training has not",
            where="projector.kind, projector.merge",
            remedy="export without --gguf, or train with projector.kind: mlp, projector.merge: none, projector.factor: 1",
        )
    source.check_vision("llama.cpp's LLaVA")
    config, tower = source.language_model.config, source.encoder.tower.config
    if source.kind != "mlp":
        reasons = {"linear": "always has GELU between two layers", "norm_mlp": "has no projector with a LayerNorm first"}
        why = reasons.get(source.kind, "knows two layers with GELU between them")
        raise PipelineError(
            f"llama.cpp cannot run a {source.kind} projector: it {why}",
            where="projector.kind",
            remedy="train with projector.kind: mlp",
        )
    if not source.has_cls:
        raise PipelineError(f"llama.cpp runs a LLaVA projector on CLIP only, this is a {tower.model_type}", where="vision.model")
    if tower.hidden_act not in USES_GELU:
        raise PipelineError(f"llama.cpp's CLIP has no activation {tower.hidden_act}", where="vision.model")
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise PipelineError(f"{config.model_type} cannot be written as GGUF here, only {known}", where="llm.model")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise PipelineError(f"rotary embedding {rope} cannot be written as GGUF here, only the default one", where="llm.model")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        raise PipelineError("a sliding attention window cannot be written as GGUF here", where="llm.model")
    split_name(source)


def split_name(source: Source) -> str:
    """llama.cpp's name for how the tokenizer cuts text; raises `PipelineError` for one it would cut otherwise."""
    state = json.loads(source.builder.tokenizer.backend_tokenizer.to_str())
    steps = state["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    normalizer = state["normalizer"]
    model = state["model"]
    plain = model["type"] == "BPE" and not model.get("byte_fallback") and (normalizer is None or normalizer["type"] == "NFC")
    if plain and kinds[-1:] == ["ByteLevel"] and not steps[-1]["add_prefix_space"]:
        words = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and words:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and words and steps[0]["individual_digits"]:
            return "smollm"
        isolated = kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]
        if isolated and not words and (name := SPLITS.get(steps[0]["pattern"].get("Regex", ""))):
            return name
    raise PipelineError(
        f"llama.cpp would cut text otherwise than its tokenizer ({model['type']}, {' + '.join(map(str, kinds))})",
        where=source.builder.model,
        remedy="use the Transformers export, or a model with the tokenizer of GPT-2, SmolLM2, Qwen or Llama 3",
        code=ARTEFACT,
    )


def _write_model(source: Source, path: Path, dtype: str) -> None:
    config = source.language_model.config
    architecture = ARCHITECTURES[config.model_type]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(source.folder.resolve().name)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(_head_size(config))
        writer.add_value_length(_head_size(config))
        writer.add_rope_dimension_count(_head_size(config))
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        _add_tokenizer(writer, source, config.vocab_size)

    write_file(path, gguf.MODEL_ARCH_NAMES[architecture], dict(_model_tensors(source, architecture)), describe, dtype=dtype)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _model_tensors(source: Source, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, torch.Tensor]]:
    config = source.language_model.config
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for full, tensor in language_tensors(source.language_model):
        name = full.removeprefix("language_model.")
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PipelineError(f"llama.cpp has no place for {name}", where="llm.model", code=ARTEFACT)
        module = name.split(".")[-2]
        if architecture == gguf.MODEL_ARCH.LLAMA and module in heads:
            tensor = _interleave(tensor, heads[module])
        yield found, tensor


def _interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Query or key weights [heads × d, ..] for llama.cpp's `llama`, which rotates neighbours where Transformers rotates halves."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _add_tokenizer(writer: gguf.GGUFWriter, source: Source, rows: int) -> None:
    tokenizer: Any = exported_tokenizer(source)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[unused{i}]" for i in range(rows)]  # embedding tables are often longer than the vocabulary
    kinds = [gguf.TokenType.UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        tokens[number], kinds[number] = token, gguf.TokenType.NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        special = token.special or token.content in source.builder.control
        kinds[number] = gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(source))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    ends = tokenizer.eos_token_id
    writer.add_eos_token_id(source.builder.end_id if ends is None else ends)
    writer.add_eot_token_id(source.builder.end_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_add_bos_token(False)  # the chat template writes all control tokens there are
    # Set, not proposed: llama.cpp's server would switch thinking on, and the model was trained without it.
    settings = [f"{{%- set {name} = {json.dumps(value)} %}}" for name, value in source.builder.options.items()]
    writer.add_chat_template("".join(settings) + source.builder.dates + str(tokenizer.chat_template))


def _write_projector(source: Source, path: Path, dtype: str) -> None:
    tower, encoder, layer = source.encoder.tower.config, source.encoder, source.depth

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_type(gguf.GGUFType.MMPROJ)
        writer.add_name(source.folder.resolve().name)
        writer.add_clip_has_vision_encoder(True)
        writer.add_bool(gguf.Keys.Clip.HAS_LLAVA_PROJECTOR, True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_projection_dim(source.model.hidden_size)
        writer.add_vision_image_size(tower.image_size)
        writer.add_vision_patch_size(tower.patch_size)
        writer.add_vision_embedding_length(tower.hidden_size)
        writer.add_vision_feed_forward_length(tower.intermediate_size)
        writer.add_vision_head_count(tower.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
        writer.add_vision_block_count(layer)
        writer.add_array("clip.vision.feature_layer", [layer])  # unset it would be the last layer but one
        writer.add_vision_image_mean(encoder.preprocess.mean)
        writer.add_vision_image_std(encoder.preprocess.std)
        writer.add_vision_use_gelu(USES_GELU[tower.hidden_act])

    tensors = dict(_vision_tensors(source, layer))
    keep = frozenset(name for name in tensors if "embd" in name)  # llama.cpp wants these in float32
    write_file(path, "clip", tensors, describe, dtype=dtype, keep=keep)


def _vision_tensors(source: Source, layers: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Tower up to hidden state `layers` and the projector, under llama.cpp's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for name, tensor in source.encoder.tower.state_dict().items():
        inner = name.removeprefix("vision_model.")
        if inner.startswith("post_layernorm."):  # hidden states are taken before it
            continue
        if inner.startswith("encoder.layers.") and int(inner.split(".")[2]) >= layers:
            continue
        found = names.get_name(f"vision_tower.vision_model.{inner}", try_suffixes=(".weight", ".bias"))
        if found is None:
            raise PipelineError(f"llama.cpp has no place for {name} of the vision tower", where="vision.model", code=ARTEFACT)
        yield found, tensor
    for name, tensor in projector_tensors(source.model.projector, source.kind).items():
        layer, _, part = name.partition(".")
        yield f"{PROJECTOR[layer]}.{part}", tensor
