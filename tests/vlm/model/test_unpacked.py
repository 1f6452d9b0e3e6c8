"""Families that are not packed on a GPU: sdpa in a fixed order, and no question to the card whether rows are packed."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HIDDEN, PATCHES, World
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, masking_utils

from pipeline.features.sources import StoredFeatures
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model.attention import choose_attention
from pipeline.vlm.model.language_model import load_language_model
from pipeline.vlm.model.ordered_attention import ORDERED
from pipeline.vlm.model.vlm import VisionLanguageModel


@pytest.fixture(scope="module", params=["llama", "window"])
def llm(request: pytest.FixtureRequest, world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "llama":
        return world.llm
    folder = tmp_path_factory.mktemp("window")
    torch.manual_seed(2)
    config = MistralConfig(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, max_position_embeddings=512, sliding_window=24, initializer_range=0.2, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


def found(world: World, model: VisionLanguageModel) -> list[torch.Tensor]:
    """Loss and all gradients of rows of many lengths, with and without pictures."""
    batch = collate(world.table, np.arange(len(world.table)), image_id=world.builder.image_id, tokens=PATCHES)
    source = StoredFeatures(world.store, world.table)
    loss, _ = model(batch, source.features(source.load(batch.slots)))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def test_a_gpu_computes_with_it_what_it_does_not_pack(world: World, llm: Path) -> None:
    language_model = world.model("all", llm=llm).language_model
    language_model.config.attention_dropout = 0.1  # nothing that is packed
    assert choose_attention(language_model, torch.device("cuda"), 100) == ORDERED


def test_scores_that_are_capped_are_no_sdpas(tmp_path: Path) -> None:
    """Transformers 5.17 says that Gemma 2 takes sdpa, which leaves its cap out: other logits, and no word."""
    config = Gemma2Config(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, attn_logit_softcapping=0.5, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    language_model = load_language_model(str(tmp_path))
    assert language_model.config._attn_implementation == "eager"
    language_model._supports_sdpa = True
    assert choose_attention(language_model, torch.device("cuda"), 4096) == "eager"


def test_it_is_sdpa_bit_for_bit_and_tells_torch_of_its_backward_passes_alone(
    world: World, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    plain: Any = torch.use_deterministic_algorithms
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode: (told.append(mode), plain(mode)))
    results = []
    for attention in ("sdpa", ORDERED):
        model = world.model("all", llm=llm)
        model.language_model.set_attn_implementation(attention)
        results.append(found(world, model))
        assert not torch.are_deterministic_algorithms_enabled()
        assert told == ([] if attention == "sdpa" else [True, False] * len(model.language_model.get_decoder().layers))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_it_leaves_a_process_that_is_deterministic_altogether_so(world: World) -> None:
    model = world.model("all")
    model.language_model.set_attn_implementation(ORDERED)
    torch.use_deterministic_algorithms(True)
    try:
        found(world, model)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pass_does_not_ask_whether_its_rows_are_packed(world: World, llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is known, it is the same without asking, and Transformers asks again afterwards."""
    asked: list[int] = []
    plain = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: asked.append(1) or plain(position_ids))
    model = world.model("all", llm=llm)
    results = [found(world, model)]
    assert not asked
    model.language_model(input_ids=torch.arange(8)[None], use_cache=False)
    assert asked, "or this would not notice"
    monkeypatch.setattr("pipeline.vlm.model.vlm.unpacked_rows", nullcontext)
    asked.clear()
    results.append(found(world, world.model("all", llm=llm)))
    assert asked
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
