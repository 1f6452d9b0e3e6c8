"""Which language models and encoders can be traced back: attention is theirs and whole, or they are refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, config_of
from test_encoder_families import CONFIGS, encoder, save
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from pipeline.core import PipelineError
from pipeline.saliency.rollout import require_attention_alone, require_room, seen_attention, weights_of
from pipeline.vlm.model import decoder_layers

FEW = ("llama", "gemma2", "gpt2", "gpt_oss", "bloom", "falcon", "falcon_h1", "lfm2", "mamba", "rwkv")
REFUSED = {
    "falcon", "falcon_h1", "lfm2", "lfm2_moe", "lfm3", "bamba", "granitemoehybrid", "jamba", "zamba", "zamba2", "nemotron_h",
    "qwen3_next", "qwen3_5_text", "olmo_hybrid", "recurrent_gemma", "minimax", "mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm",
    "bert", "roberta", "electra", "xlnet",
}  # fmt: skip
MANY = [name for name in FAMILIES if name in CONFIG_MAPPING and name not in FEW]  # those that this Transformers has
TOKENS = 12


def seen(family: str) -> None:
    """Raises `PipelineError` where a family is refused; what is seen belongs to the answer it gives without being looked at."""
    torch.manual_seed(1)
    config = config_of(family)
    capped = getattr(config, "attn_logit_softcapping", None)  # which sdpa leaves out, and Transformers 5.17 takes it all the same
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if capped else None).eval()
    embedded = torch.randn(1, TOKENS, model.get_input_embeddings().weight.shape[1])
    with torch.no_grad():
        plain = model(inputs_embeds=embedded.clone(), use_cache=False).logits
        require_attention_alone(model)
        with seen_attention(model):
            output = model(inputs_embeds=embedded.clone(), use_cache=False, output_attentions=True)
    weights_of(model, getattr(output, "attentions", None), len(decoder_layers(model)), TOKENS, causal=True)
    assert torch.allclose(output.logits, plain, rtol=1e-4, atol=1e-4 * float(plain.abs().max())), family


@pytest.mark.parametrize("family", FEW)
def test_a_family_is_seen_or_refused_by_name(family: str) -> None:
    if family not in REFUSED:
        seen(family)
        return
    with pytest.raises(PipelineError, match=f"the attention of a {family} cannot be traced back") as caught:
        seen(family)
    assert caught.value.remedy == "take --by gradient"


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in MANY if not config_of(name).is_encoder_decoder])
def test_every_family_is_seen_or_refused_by_name(family: str) -> None:
    test_a_family_is_seen_or_refused_by_name(family)


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model", "dinov2_with_registers"])
def test_an_encoder_is_seen(family: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[family])
    made = encoder(tmp_path)
    tower, pixels = made.exact_tower(), torch.randint(0, 256, (1, 3, made.side, made.side), dtype=torch.uint8)
    wanted = made.encode(pixels, ["one"])
    with torch.no_grad(), seen_attention(tower):
        found, output = made.trace(tower, pixels, "float32", output_attentions=True)
    tokens = output.attentions[0].shape[-1]
    assert len(weights_of(tower, output.attentions, tower.config.num_hidden_layers, tokens, causal=False)) == 3
    assert torch.allclose(found, wanted.float(), rtol=1e-2, atol=1e-2)
    sought = pixels.float().requires_grad_()
    (gradient,) = torch.autograd.grad(made.trace(tower, sought, "float32")[0].square().sum(), sought)
    assert gradient.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_every_encoder_is_seen(family: str, tmp_path: Path) -> None:
    test_an_encoder_is_seen(family, tmp_path)


def test_attention_that_would_fill_the_memory_is_refused_with_its_size() -> None:
    model: Any = AutoModelForCausalLM.from_config(config_of("llama"))
    require_room(model, 28, 1024)
    with pytest.raises(PipelineError, match=r"28 layers among 10,000 tokens is 44\.8 GB, more than 4\.3"):
        require_room(model, 28, 10_000)
