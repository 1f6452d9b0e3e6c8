"""A MiniMind layout <-> the configuration of the Transformers class that computes the same.

A `.pth` holds tensors only: what they do not tell (eps, rotary base, experts a token) is MiniMind's default unless given.
"""

import math
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from pipeline.core import PipelineError
from pipeline.minimind.layout import HEADS, KV_HEADS, Layout

POSITIONS, ROPE_THETA = 32768, 1e6
EPS = {2025: 1e-5, 2026: 1e-6}
EXPERTS_PER_TOKEN = {2025: 2, 2026: 1}
CLASSES: dict[tuple[int, bool], tuple[type[PreTrainedConfig], str]] = {  # by year, and whether it is a mixture
    (2025, False): (LlamaConfig, "LlamaForCausalLM"),
    (2025, True): (Qwen2MoeConfig, "Qwen2MoeForCausalLM"),
    (2026, False): (Qwen3Config, "Qwen3ForCausalLM"),
    (2026, True): (Qwen3MoeConfig, "Qwen3MoeForCausalLM"),
}


def describe(
    layout: Layout,
    *,
    eps: float | None = None,
    rope_theta: float | None = None,
    positions: int | None = None,
    experts_per_token: int | None = None,
) -> PreTrainedConfig:
    """The configuration of the Transformers class that computes the same; None stands for MiniMind's default."""
    shared: dict[str, Any] = {
        "vocab_size": layout.vocab,
        "hidden_size": layout.hidden,
        "intermediate_size": layout.intermediate,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.heads,
        "num_key_value_heads": layout.kv_heads,
        "max_position_embeddings": positions or POSITIONS,
        "rms_norm_eps": eps or EPS[layout.year],
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta or ROPE_THETA},
        "tie_word_embeddings": layout.tied,
    }
    if layout.year == 2026 or not layout.experts:
        shared["head_dim"] = layout.head_dim
    if layout.experts:
        shared |= _mixture(layout, experts_per_token or EXPERTS_PER_TOKEN[layout.year])
    kind, model = CLASSES[layout.year, bool(layout.experts)]
    return kind(**shared, architectures=[model])


def _mixture(layout: Layout, chosen: int) -> dict[str, Any]:
    """MiniMind adds up its balance loss over the layers; Transformers averages it, so its factor is that much larger.

    MiniMind's own factors: 0.01 (December 2025, of a loss that is 1 when balanced), 5e-4 (2026).
    """
    mixture: dict[str, Any] = {
        "num_experts": layout.experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": layout.intermediate,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    if layout.year == 2026:
        return mixture | {"norm_topk_prob": True, "router_aux_loss_coef": round(5e-4 * layout.layers, 6)}
    return mixture | {
        "norm_topk_prob": chosen > 1,
        "router_aux_loss_coef": round(0.01 * layout.layers / chosen, 6),
        "shared_expert_intermediate_size": layout.shared * layout.intermediate,
        "qkv_bias": False,
    }


def layout_of(config: PreTrainedConfig, *, where: str) -> Layout:
    """The MiniMind layout of a Transformers model; raises `PipelineError` naming what MiniMind cannot compute."""
    kinds = {kind: key for key, (kind, _) in CLASSES.items()}
    if type(config) not in kinds:
        known = ", ".join(str(kind.model_type) for kind in kinds)
        raise PipelineError(f"a {config.model_type} model has no MiniMind layout, which is one of {known}", where=where)
    year, mixture = kinds[type(config)]
    plain: Any = config
    chosen = getattr(plain, "num_experts_per_tok", 0)
    head_dim = getattr(plain, "head_dim", None) or plain.hidden_size // plain.num_attention_heads
    wanted: dict[str, Any] = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
    wanted |= {"qkv_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
    wanted["norm_topk_prob"] = year == 2026 or chosen > 1
    for key, value in wanted.items():
        if getattr(plain, key, value) != value:
            raise PipelineError(f"{key} is {getattr(plain, key)!r}, MiniMind's is {value!r}", where=where)
    if plain.rope_parameters["rope_type"] != "default":
        raise PipelineError(f"rope_type is {plain.rope_parameters['rope_type']}, MiniMind's is default", where=where)
    if year == 2025 and (not plain.tie_word_embeddings or head_dim * plain.num_attention_heads != plain.hidden_size):
        what = "tied embeddings and heads × head_dim = hidden_size"
        raise PipelineError(f"MiniMind's layout of 2025 has {what}, this model has not", where=where)
    if year == 2025 and mixture and (plain.shared_expert_intermediate_size % plain.moe_intermediate_size):
        raise PipelineError("its shared expert is no whole number of experts wide, MiniMind's is", where=where)
    return Layout(
        year=year,
        vocab=plain.vocab_size,
        hidden=plain.hidden_size,
        layers=plain.num_hidden_layers,
        heads=plain.num_attention_heads,
        kv_heads=plain.num_key_value_heads,
        head_dim=head_dim,
        intermediate=plain.moe_intermediate_size if mixture else plain.intermediate_size,
        experts=plain.num_experts if mixture else 0,
        shared=plain.shared_expert_intermediate_size // plain.moe_intermediate_size if mixture and year == 2025 else 0,
        tied=plain.tie_word_embeddings,
    )


def settings(config: PreTrainedConfig, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a `.pth` does not say: arguments of MiniMind's `MiniMindConfig`, and options of our `import`, to read it back."""
    plain: Any = config
    old = layout.year == 2025
    width = int(layout.hidden * 8 / 3) if old else layout.hidden * math.pi
    defaults = {
        "hidden_size": (layout.hidden, None),
        "num_hidden_layers": (layout.layers, None),
        "num_attention_heads": (layout.heads, HEADS),
        "num_key_value_heads": (layout.kv_heads, KV_HEADS if old else 4),
        "intermediate_size": (layout.intermediate, 64 * math.ceil(width / 64)),
        "vocab_size": (layout.vocab, 6400),
        "rms_norm_eps": (plain.rms_norm_eps, EPS[layout.year]),
        "rope_theta": (plain.rope_parameters["rope_theta"], ROPE_THETA),
        "max_position_embeddings": (plain.max_position_embeddings, POSITIONS),
        "head_dim": (layout.head_dim, layout.hidden // layout.heads),
        "tie_word_embeddings": (layout.tied, True),
    }
    names = {"--eps": "rms_norm_eps", "--rope-theta": "rope_theta", "--positions": "max_position_embeddings"}
    options = {option: defaults[key] for option, key in names.items()}
    if old:
        usual = layout.heads == HEADS and layout.kv_heads == KV_HEADS
        options["--heads"] = (layout.heads, layout.heads if usual else None)
    if layout.experts:
        chosen = (plain.num_experts_per_tok, EXPERTS_PER_TOKEN[layout.year])
        options["--experts-per-token"] = defaults["num_experts_per_tok"] = chosen
        defaults |= {"use_moe": (True, False), ("n_routed_experts" if old else "num_experts"): (layout.experts, 4)}
        defaults |= {"n_shared_experts": (layout.shared, 1)} if old else {}
    theirs, ours = ({key: value for key, (value, usual) in table.items() if value != usual} for table in (defaults, options))
    return theirs, ours
