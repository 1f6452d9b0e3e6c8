"""Large matrices in float16 for one answer: close to float32, in use only while an answer is made, and only where they gain."""

from pathlib import Path

import pytest
import torch
from conftest import World
from test_chat import trained  # noqa: F401
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.chat import packed as packing
from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.chat.look import look_back
from pipeline.chat.packed import SMALLEST, pack, using

pytestmark = pytest.mark.skipif(torch.backends.quantized.engine not in ("x86", "fbgemm"), reason="not an x86 processor")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 256), (3, 5, 256), (0, 256)], ids=str)
def test_a_packed_layer_multiplies_as_its_float32_does_to_float16(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ROWS", 200)  # in three parts
    torch.manual_seed(0)
    layer = nn.Linear(256, SMALLEST // 256, bias=bias)
    states = torch.randn(shape)
    exact = layer(states)
    with using(pack(layer)), torch.no_grad():
        made = layer(states)
        rounded = nn.functional.linear(states, layer.weight.half().float(), layer.bias if bias else None)
    assert made.shape == exact.shape
    assert torch.allclose(made, rounded, atol=1e-5)
    assert made.numel() == 0 or not torch.allclose(made, exact, atol=1e-5)
    layer(states).sum().backward()
    assert layer.weight.grad is not None  # gradients go through the layer itself again


def test_weights_that_float16_cannot_hold_are_not_packed() -> None:
    layer = nn.Linear(256, SMALLEST // 256)
    assert pack(layer)
    for wrong in (1e5, float("inf"), float("nan")):
        layer.weight.data[3, 4] = wrong
        assert not pack(layer)


def test_only_large_layers_are_packed_and_tied_tables_stay_as_they_are() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids).logits
        packed = pack(model)
        with using(packed):
            inside = model(ids).logits
        after = model(ids).logits
    wide = [name for name, layer in model.named_modules() if layer in packed]
    assert wide == [*(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 1) for name in ("gate", "up", "down")), "lm_head"]
    assert torch.equal(before, after)
    assert torch.cosine_similarity(inside.flatten(), before.flatten(), dim=0) > 0.99999
    assert not torch.equal(inside, before)


def test_one_answer_is_made_with_them_and_neither_several_nor_looking_back(
    trained: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SMALLEST", 1)
    assistant, data = Assistant(trained, device="cpu"), (world.folder / "images/0.png").read_bytes()
    used: list[bool] = []
    head = assistant.model.language_model.get_output_embeddings()
    hook = head.register_forward_hook(lambda layer, *_: used.append("forward" in vars(layer)))
    talk = Conversation()
    assistant.ask(talk, "What is this?", assistant.look_at(data, "one"))
    list(assistant.answer(talk, Sampling(4)))
    assert used
    assert all(used)
    used.clear()
    assistant.answer_all([("What is this?", talk.features)] * 2, Sampling(2))
    look_back(assistant, talk.turns, [data], ["rollout", "gradient"])
    assert used
    assert not any(used)
    hook.remove()


def test_an_answer_that_fails_leaves_the_model_as_it_was(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SMALLEST", 1)
    assistant, talk = Assistant(trained, device="cpu"), Conversation()
    assistant.ask(talk, "What is this?")
    monkeypatch.setattr(type(assistant.model), "embed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(assistant.answer(talk, Sampling(2)))
    assert assistant.packed
    assert not any("forward" in vars(layer) for layer in assistant.packed)
