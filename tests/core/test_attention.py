"""Our attention for CPUs computes what Transformers' eager one does: values, gradients, padding, caches, shared key heads."""

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pipeline.core import causal
from pipeline.core.attention import GROUPED

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
}


@pytest.fixture(params=["llama, one key head a query head", "llama, shared key heads", "qwen3, one key head for all"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    if request.param.startswith("qwen3"):
        return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1))
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4 if "one key" in request.param else 2))


def outputs(model: PreTrainedModel, attention: str, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.set_attn_implementation(attention)
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits[:, -3:].square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients_are_those_of_eager_attention(model: PreTrainedModel, padded: bool) -> None:
    ids = torch.randint(60, (3, 11))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :4] = 0  # left, as generation pads
    inputs = {"input_ids": ids, **({"attention_mask": mask} if padded else {})}
    expected, gradients = outputs(model, "eager", **inputs)
    found, own = outputs(model, GROUPED, **inputs)
    real = mask.bool() if padded else torch.ones_like(mask).bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)
    assert len(own) == len(gradients)
    for one, other in zip(own, gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_gives_the_same_words(model: PreTrainedModel) -> None:
    ids = torch.randint(60, (2, 7))
    texts = []
    for attention in ("eager", GROUPED):
        model.set_attn_implementation(attention)
        texts.append(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist())
    assert texts[0] == texts[1]


def test_in_bfloat16_it_is_as_close_to_float32_as_eager_is(model: PreTrainedModel) -> None:
    ids = torch.randint(60, (4, 20))
    exact, _ = outputs(model, "eager", input_ids=ids)
    errors = []
    for attention in ("eager", GROUPED):
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = outputs(model, attention, input_ids=ids)
        errors.append(float((found.float() - exact).norm() / exact.norm()))
    assert errors[1] < 1.5 * errors[0]


def test_padding_that_sees_nothing_stays_finite_in_bfloat16(model: PreTrainedModel) -> None:
    """Its keys and values go on to the next layer, where nought times not-a-number would spoil every row."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :5] = 0
    ids, found = torch.randint(60, (2, 9)), []
    for attention in ("eager", GROUPED):
        model.set_attn_implementation(attention)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            found.append(model(ids, attention_mask=mask).logits)
    assert torch.isfinite(found[1]).all()
    assert torch.allclose(found[1][mask.bool()], found[0][mask.bool()], atol=0.05)


def test_a_vision_tower_attends_to_everything() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).eval()
    pixels, found = torch.randn(2, 3, 32, 32), []
    for attention in ("eager", GROUPED):
        tower.set_attn_implementation(attention)
        with torch.inference_mode():
            found.append(tower(pixels).last_hidden_state)
    assert torch.allclose(found[1], found[0], atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 3, 11, 12, pytest.param(29, marks=pytest.mark.slow)])
@pytest.mark.parametrize("masks", [1, 2])
def test_causal_blocks_are_plain_attention(monkeypatch: pytest.MonkeyPatch, tokens: int, masks: int) -> None:
    """Values against the formula and gradients against numerical ones, in float64, where blocks are of one to five queries."""
    monkeypatch.setattr(causal, "BLOCK", 4)
    torch.manual_seed(0)
    query, key, value = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, tokens, 5), *[(2, tokens, 5)] * 2))
    mask = torch.full((tokens, tokens), -1e30, dtype=torch.float64).triu(1)[None].repeat(masks, 1, 1)
    mask[-1, :, 1:2] -= 0.5
    mask[-1, tokens // 2 :, 0] = -1e30 if tokens > 1 else 0.0  # as another conversation's, or padding
    weights = torch.softmax(query @ key[:, None].transpose(2, 3) + mask[:, None], -1)
    assert torch.allclose(causal.CausalAttention.apply(query, key, value, mask), weights @ value[:, None], atol=1e-12)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    assert torch.autograd.gradcheck(lambda *given: causal.CausalAttention.apply(*given, mask), inputs)


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_in_many_blocks_is_the_model_in_one(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, padded: bool) -> None:
    monkeypatch.setattr(causal, "BLOCK", 3)
    test_values_and_gradients_are_those_of_eager_attention(model, padded)
