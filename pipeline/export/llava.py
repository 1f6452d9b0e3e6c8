"""A checkpoint's parts -> config and weights of a Transformers LLaVA model, under the tensor names of llava-hf.

linear and mlp become `LlavaForConditionalGeneration` (arXiv 2310.03744), norm_mlp `VipLlavaForConditionalGeneration`
(arXiv 2312.00784), whose projector is the one with a LayerNorm in front. Shapes: Dv vision width, D hidden size.
"""

import json
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from pipeline.core import ARTEFACT, PipelineError, set_mode
from pipeline.core.devices import DTYPES
from pipeline.export.source import Source
from pipeline.vlm.model import (
    LAYERS,
    backbone,
    backbone_name,
    logit_factor,
    out_of_place,
    output_head,
    require_place,
)

LAYER_KEYS = ("vision_feature_layer", "vision_feature_layers")
ACTIVATION = {"linear": "linear", "mlp": "gelu_pytorch_tanh", "norm_mlp": "gelu"}


def check_exportable(source: Source) -> None:
    """Raises `PipelineError` where no Transformers class computes what this pipeline does."""
    source.check_vision("Transformers' LLaVA")
    tower = source.encoder.tower.config
    layer, depth = source.manifest.vision["layer"], tower.num_hidden_layers
    require_place(source.kind, family=tower.model_type, has_cls=source.has_cls, layer=layer, layers=depth)
    check_language_model(source, "LLaVA")


def check_language_model(source: Source, target: str) -> None:
    """Raises `PipelineError` for a language model that `target` has no place for: all stock classes hold a backbone and a head."""
    if problem := out_of_place(source.language_model):
        problem = problem.replace("LLaVA", target)
        raise PipelineError(
            problem, where="llm.model", remedy="python -m pipeline.chat runs it; to export, choose another", code=ARTEFACT
        )
    if logit_factor(source.language_model) is None:
        problem = f"{type(source.language_model).__name__} does more to its logits than a factor, which {target} leaves out"
        raise PipelineError(problem, where="llm.model", remedy="choose another llm.model", code=ARTEFACT)


def build_config(source: Source, dtype: str) -> PreTrainedConfig:
    """The config of the exported model; raises `PipelineError` where an exact export does not exist."""
    check_exportable(source)
    kind, encoder = source.kind, source.encoder
    text, vision = deepcopy(source.language_model.config), deepcopy(encoder.tower.config)
    text.architectures = [type(source.language_model).__name__]  # vLLM finds the inner model by it
    text.tie_word_embeddings = is_tied(source.language_model)
    text._name_or_path = vision._name_or_path = ""  # where they lay on this machine is nobody's business
    settings: dict[str, Any] = {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": source.builder.image_id,
        "image_seq_length": encoder.tokens,
        "projector_hidden_act": ACTIVATION[kind],
        "vision_feature_layer": source.depth - vision.num_hidden_layers - 1,
        "tie_word_embeddings": text.tie_word_embeddings,
    }
    if kind == "norm_mlp":
        norm: Any = source.model.projector[0]
        config: PreTrainedConfig = VipLlavaConfig(**settings, projector_layernorm_eps=norm.eps)
        config.architectures = [VipLlavaForConditionalGeneration.__name__]
    else:
        settings |= {"multimodal_projector_bias": True, "vision_feature_select_strategy": source.select_strategy}
        config = LlavaConfig(**settings)
        config.architectures = [LlavaForConditionalGeneration.__name__]
    config.dtype = text.dtype = vision.dtype = DTYPES[dtype]
    return config


def build_generation_config(source: Source) -> GenerationConfig:
    """Greedy, as the pipeline measures; ends at the end-of-turn token, then at whatever else ends the language model's text."""
    builder, habits = source.builder, source.language_model.generation_config
    own = habits.eos_token_id if habits is not None else None
    others = own if isinstance(own, list) else [] if own is None else [own]
    padding = builder.tokenizer.pad_token_id
    return GenerationConfig(
        eos_token_id=[builder.end_id, *(int(token) for token in others if token != builder.end_id)],
        pad_token_id=builder.end_id if padding is None else padding,
        bos_token_id=builder.tokenizer.bos_token_id,
        suppress_tokens=builder.suppressed,
        do_sample=False,
    )


def projector_tensors(projector: nn.Sequential, kind: str) -> dict[str, torch.Tensor]:
    """Our projector under LLaVA's names; `linear` gets an identity second layer, so that W2(W1 x + b1) + b2 = W1 x + b1."""
    state = projector.state_dict()
    tensors = {}
    for name, tensor in state.items():
        place, _, part = name.partition(".")
        tensors[f"{LAYERS[kind][place]}.{part}"] = tensor
    if kind == "linear":
        width = tensors["linear_1.bias"].shape[0]
        tensors["linear_2.weight"], tensors["linear_2.bias"] = torch.eye(width), torch.zeros(width)
    return tensors


def is_tied(language_model: PreTrainedModel) -> bool:
    """Whether the exported vocabulary projection is the embedding table, under the only name by which LLaVA ties it."""
    own, table = backbone(language_model), language_model.get_input_embeddings()
    tied = output_head(language_model).weight is getattr(table, "weight", None)
    return tied and getattr(own, "embed_tokens", None) is table and logit_factor(language_model) == 1


def language_tensors(language_model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's tensors as Transformers writes them to disk, under llava-hf's names.

    Through a file, because a model in memory can be laid out otherwise (a mixture's experts are stacked there). A family's
    constant factor on its logits goes into the projection to the vocabulary.
    """
    inner, head = f"{backbone_name(language_model)}.", output_head(language_model)
    with tempfile.TemporaryDirectory() as folder:
        language_model.save_pretrained(folder)
        for path in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (no dict)
                    if name.startswith(inner):
                        yield f"language_model.model.{name.removeprefix(inner)}", file.get_tensor(name)
                    elif file.get_slice(name).get_shape() != list(head.weight.shape):  # named otherwise on disk by some
                        problem = f"LLaVA has no place for {name} of {type(language_model).__name__}"
                        raise PipelineError(problem, where="llm.model", code=ARTEFACT)
    if not is_tied(language_model):
        factor = logit_factor(language_model)
        assert factor is not None  # `check_exportable`
        yield "language_model.lm_head.weight", head.weight.detach() * factor


def _save_config(config: PreTrainedConfig, folder: Path) -> None:
    """config.json. VipLlava's key for the hidden state that counts was another up to Transformers 5.22: both are written."""
    config.save_pretrained(folder)
    if isinstance(config, VipLlavaConfig):
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= dict.fromkeys(LAYER_KEYS, getattr(config, LAYER_KEYS[0]))
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_model(source: Source, folder: Path, dtype: str) -> int:
    """config.json, generation_config.json and model.safetensors (or shards with an index); returns the parameter count."""
    config = build_config(source, dtype)
    projector = projector_tensors(source.model.projector, source.kind)
    tensors = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    for name, tensor in source.encoder.tower.state_dict().items():
        # Readers older than Transformers 5, and vLLM, know the tower only with this prefix; 5 reads both.
        tensors[f"vision_tower.vision_model.{name.removeprefix('vision_model.')}"] = tensor
    tensors |= dict(language_tensors(source.language_model))
    _save_config(config, folder)
    build_generation_config(source).save_pretrained(folder)
    return write_weights(tensors, folder, dtype)


def write_weights(tensors: dict[str, torch.Tensor], folder: Path, dtype: str) -> int:
    """model.safetensors (or shards with an index) beside a config.json; returns the parameter count."""
    cast = {
        name: tensor.detach().to(DTYPES[dtype] if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    save_torch_state_dict(cast, folder, max_shard_size="5GB", metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):
        set_mode(path, (folder / "config.json").stat().st_mode)  # the writer leaves them to their owner alone
    return sum(tensor.numel() for tensor in cast.values())
