"""Language models of many families, tiny and random: each folder is one that `llm.model` could name.

A family is a `model_type` of Transformers and what of its configuration must be said beside `COMMON` to make it small, or to
have a layer of each of its kinds. What the tests find out about all of them is the table in docs/families.md.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

COMMON: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
MOE: dict[str, Any] = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA2: dict[str, Any] = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_chunk_size": 16,
}  # fmt: skip
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}  # fmt: skip
BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DECODER: dict[str, Any] = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, **NO_DROPOUT,
}  # fmt: skip

# The families people bring, by what their layers are. False: leave a common setting out.
FAMILIES: dict[str, dict[str, Any]] = {
    # attention over rotated queries and keys
    "llama": {}, "mistral": {}, "ministral": {}, "ministral3": {}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {},
    "gemma3_text": {}, "phi": {"num_key_value_heads": 4}, "phi3": {}, "smollm3": {}, "olmo": {}, "olmo2": {}, "olmo3": {},
    "starcoder2": {}, "stablelm": {}, "granite": {"embedding_multiplier": 12.0, "logits_scaling": 8.0,
    "residual_multiplier": 0.22, "attention_multiplier": 0.1},
    "cohere": {}, "cohere2": {}, "glm": {}, "glm4": {}, "helium": {}, "exaone4": {}, "nemotron": {}, "persimmon": {},
    "hunyuan_v1_dense": {}, "ernie4_5": {}, "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.0},
    "arcee": {}, "apertus": {}, "diffllama": {}, "doge": {},
    "bitnet": {}, "cwm": {}, "nanochat": {}, "hyperclovax": {}, "jais2": {}, "vaultgemma": {}, "granite_swa":
    {"attention_multiplier": 0.25}, "lfm3": {},
    "minicpm3": {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim":
    8, "v_head_dim": 8, "scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4},
    "youtu": {k: v for k, v in DEEPSEEK.items() if k in ("num_key_value_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim")},
    "modernbert-decoder": {"embedding_dropout": 0.0, "mlp_dropout": 0.0},
    # other kinds of positions, older layouts
    "gpt2": {"n_inner": 48, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neo": {"initializer_range": 0.1, "attention_types": [[["global", "local"], 2]], "window_size": 64},
    "gpt_neox": {}, "gptj": {"rotary_dim": 4}, "codegen": {"rotary_dim": 4}, "gpt_bigcode": {"resid_pdrop": 0.0,
    "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "falcon": {"head_dim": False}, "bloom": {}, "mpt": {"attn_config": {"attn_type": "multihead_attention"}},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 64, **NO_DROPOUT}, "xglm": {"ffn_dim": 48, "d_model": 64,
    "attention_heads": 4, "num_layers": 4, **NO_DROPOUT},
    "biogpt": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0}, "ctrl": {"dff":
    48, "resid_pdrop": 0.0, "embd_pdrop": 0.0}, "openai-gpt": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox_japanese": {"attention_dropout": 0.0, "hidden_dropout": 0.0},
    # mixtures of experts
    "mixtral": {"num_local_experts": 4}, "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16}, "qwen3_moe": {**MOE},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}, "granitemoe":
    {"num_local_experts": 4, "attention_multiplier": 0.25}, "granitemoeshared": {"num_local_experts": 4,
    "shared_intermediate_size": 16, "attention_multiplier": 0.25},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16, "head_dim": False}, "gpt_oss": {"num_local_experts": 4},
    "deepseek_v2": DEEPSEEK, "deepseek_v3": DEEPSEEK,
    "glm4_moe": {**DEEPSEEK, "num_key_value_heads": 2}, "dots1": {**DEEPSEEK, "num_key_value_heads": 2}, "ernie4_5_moe":
    {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2}, "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp":
    48, "attention_chunk_size": 64}, "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4},
    # layers that are no attention, between some that are
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {**MOE, "layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 128}, "bamba": {**MAMBA2, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**MAMBA2, "layer_types": ["linear_attention", "full_attention"] * 2, "num_local_experts": 4,
    "shared_intermediate_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 4, "mamba_d_state":
    8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "zamba": {"initializer_range": 0.1, "layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 8,
    "mamba_dt_rank": 4, "head_dim": False, "num_key_value_heads": 4, "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_d_state": 8, "n_mamba_heads": 4,
    "mamba_ngroups": 1, "head_dim": False, "num_key_value_heads": 4, "chunk_size": 16, "num_mem_blocks": 1,
    "use_mamba_kernels": False},
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "mamba", "moe"], "mamba_num_heads": 4, "mamba_head_dim": 32,
    "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16, "n_routed_experts": 4, "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16, "num_experts_per_tok": 2},
    "qwen3_next": {**MOE, **DELTA, "shared_expert_intermediate_size": 16}, "qwen3_5_text": DELTA, "olmo_hybrid": {},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "minimax": {"initializer_range": 0.1, "num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
    "block_size": 16},
    "mamba": {"state_size": 8}, "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1, "chunk_size":
    16}, "falcon_mamba": {"state_size": 8},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512}, "xlstm": {"num_heads": 4, "chunk_size": 16},
    # no causal language models, though Transformers loads some of them as such
    "bert": BERT, "roberta": BERT, "electra": BERT, "xlnet": {"max_position_embeddings": False, "d_model": 64, "n_head": 4,
    "d_inner": 48, "dropout": 0.0, "head_dim": False},
    "bart": DECODER, "t5": {"d_model": 64, "d_kv": 8, "d_ff": 48, "num_heads": 4}, "pegasus": DECODER,
}  # fmt: skip


def config_of(family: str) -> Any:
    """A tiny configuration of a family."""
    settings = {**COMMON, **FAMILIES[family]}
    return AutoConfig.for_model(family, **{key: value for key, value in settings.items() if value is not False})


def write_family(family: str, folder: Path, tokenizer: Any) -> Path:
    """A tiny random model of a family with a tokenizer, as a folder that `llm.model` can name."""
    torch.manual_seed(1)
    config = config_of(family)
    tokenizer.save_pretrained(folder)
    family_of = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    family_of.from_config(config).save_pretrained(folder)
    return folder
