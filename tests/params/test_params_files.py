"""Every file in docs/params fits the models that it names: image tokens, widths, projector and placeholder.

The models are built here with the published shapes (fewer layers, narrower MLPs, a small vocabulary, random weights) in folders
that look like the hub's: whole CLIP and SigLIP checkpoints with their text towers, and preprocessor_config.json in its old and
new spelling. What is asked is this project's own encoder, tokenizer code and projector.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core.errors import PipelineError
from pipeline.core.grid import merged_tokens
from pipeline.features.encoder.encoder import Encoder
from pipeline.params.reading import load
from pipeline.records.decoder import decode
from pipeline.records.record import ImageSlot, Turn
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.language_model import hidden_size, load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

FILES = sorted((Path(__file__).parents[2] / "docs" / "params").glob("*.yaml"))

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_rescale": True, "rescale_factor": 1 / 255, "resample": 2}


def siglip(size: int) -> dict[str, Any]:
    return {"image_processor_type": "SiglipImageProcessor", "do_resize": True, "size": {"height": size, "width": size}, **HALF}


def clip(size: int) -> dict[str, Any]:
    """As the CLIP repositories have it, from before sizes had names."""
    steps = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "resample": 3}
    kind = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": size, "size": size}
    return {**kind, **steps, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}


@dataclass(frozen=True, slots=True)
class Tower:
    """Published shape of an encoder: Dv, heads, pixels a side of the picture and of a patch, and its preprocessing."""

    width: int
    heads: int
    image: int
    patch: int
    preprocess: dict[str, Any]


TOWERS = {
    "openai/clip-vit-base-patch16": Tower(768, 12, 224, 16, clip(224)),
    "openai/clip-vit-large-patch14-336": Tower(1024, 16, 336, 14, clip(336)),
    "google/siglip-base-patch16-224": Tower(768, 12, 224, 16, siglip(224)),
    "google/siglip-base-patch16-512": Tower(768, 12, 512, 16, siglip(512)),
    "google/siglip2-base-patch32-256": Tower(768, 12, 256, 32, siglip(256)),
}
LLMS: dict[str, tuple[type[Any], str, dict[str, Any]]] = {  # config class, kind of tokenizer and template, published shape
    "jingyaogong/MiniMind2-Small": (
        LlamaConfig,
        "smollm2",
        {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        LlamaConfig,
        "smollm2",
        {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": (
        Qwen2Config,
        "qwen3",
        {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2},
    ),
    "Qwen/Qwen3-0.6B": (
        Qwen3Config,
        "qwen3",
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    ),
    "jingyaogong/minimind-3": (
        Qwen3Config,
        "qwen3",
        {"hidden_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 96},
    ),
    "jingyaogong/minimind-3-moe": (
        Qwen3MoeConfig,
        "qwen3",
        {
            "hidden_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 96, "num_experts": 4,
            "num_experts_per_tok": 1, "norm_topk_prob": True, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.004,
        },
    ),
}  # fmt: skip
# What each file comes to: tokens an image, vision width Dv, hidden size D, and the shapes of the projector's matrices.
EXPECTED: dict[str, tuple[int, int, int, list[tuple[int, ...]]]] = {
    "minimind-v-2025": (196, 768, 512, [(512, 768)]),
    "minimind-v-2026": (64, 768, 768, [(768, 768), (768, 768)]),
    "minimind-v-2026-moe": (64, 768, 768, [(768, 768), (768, 768)]),
    "nanovlm": (49, 768, 576, [(576, 4 * 768)]),
    "smolvlm-256m": (64, 768, 576, [(576, 16 * 768)]),
    "smollm2-135m": (196, 768, 576, [(576, 768), (576, 576)]),
    "llava-1.5": (576, 1024, 1536, [(1536, 1024), (1536, 1536)]),
    "qwen3-0.6b": (196, 768, 1024, [(1024, 768), (1024, 1024)]),
}
TALK = [Turn("user", (ImageSlot(0), "\nWhat is this?")), Turn("assistant", ("It is a red circle.",))]


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Hub id of an encoder -> a folder like its repository."""

    @cache
    def make(name: str) -> str:
        shape, folder = TOWERS[name], tmp_path_factory.mktemp("tower")
        torch.manual_seed(1)
        small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        text = {**small, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        vision = {
            "hidden_size": shape.width, "num_attention_heads": shape.heads, "image_size": shape.image, "patch_size": shape.patch,
            "intermediate_size": 16, "num_hidden_layers": 3,
        }  # fmt: skip
        if "clip" in shape.preprocess.get("feature_extractor_type", "").lower():
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
        else:
            SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(shape.preprocess))
        return str(folder)

    return make


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Hub id of a language model -> a folder with its shape and a tokenizer and template like its own."""

    @cache
    def make(name: str) -> str:
        family, dialect, shape = LLMS[name]
        folder, tokenizer = tmp_path_factory.mktemp("llm"), train_tokenizer(dialect)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(2)
        config = family(
            vocab_size=len(tokenizer), intermediate_size=64, num_hidden_layers=3, tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **shape,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return str(folder)

    return make


def encoder_of(folder: str, **options: Any) -> Encoder:
    return Encoder(folder, precision="float32", device=CPU, batch=1, **options)


def test_every_file_is_in_the_table() -> None:
    assert {file.stem for file in FILES} == set(EXPECTED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_params_file_fits_the_models_it_names(
    file: Path, tower: Callable[[str], str], llm: Callable[[str], str], png: Callable[[int], bytes]
) -> None:
    params, (tokens, width, hidden, matrices) = load(file), EXPECTED[file.stem]
    encoder = encoder_of(tower(params.vision.model), layer=params.vision.layer, storage=params.vision.storage)
    assert (merged_tokens(encoder.tokens, params.projector.factor), encoder.width) == (tokens, width)
    features = encoder.encode_files([png(1)], ["a picture that is not square"])
    assert features.shape == (1, encoder.tokens, width)

    builder = PromptBuilder(llm(params.llm.model), image_token=params.llm.image_token, tokens=tokens)
    prompt = builder.build(TALK)
    start = prompt.image_starts[0]
    assert (prompt.ids == builder.image_id).sum() == tokens
    assert (prompt.ids[start : start + tokens] == builder.image_id).all()
    assert len(prompt.ids) + 150 < params.tokenize.max_tokens, "an ordinary question and answer must fit behind the picture"

    language_model = load_language_model(llm(params.llm.model))
    assert hidden_size(language_model) == hidden
    projector = build_projector(
        params.projector.kind, encoder.width, hidden_size(language_model), params.projector.merge, params.projector.factor
    )
    assert [tuple(p.shape) for p in projector.parameters() if p.ndim == 2] == matrices
    model = VisionLanguageModel(projector, language_model)
    embedded = model.embed(torch.from_numpy(prompt.ids).long()[None], features, torch.tensor([0]), torch.tensor([start]))
    assert embedded.shape == (1, len(prompt.ids), hidden)
    logits = language_model(inputs_embeds=embedded).logits
    assert torch.isfinite(logits).all()
    for training in (params.pretrain, params.sft):
        counts = freeze(model, training.train)
        assert counts["projector"] == sum(p.numel() for p in projector.parameters())
        assert (counts["language_model"] > 0) == (training.train != "projector")
        assert model.router_trains == (file.stem.endswith("-moe") and training.train != "projector")
    assert params.pretrain.train == "projector"


@pytest.mark.parametrize("layer", [-1, 3, -2, 1])
@pytest.mark.parametrize("name", ["google/siglip2-base-patch32-256", "google/siglip-base-patch16-224"])
def test_siglip_gives_every_token_of_the_stock_model(
    name: str, layer: int, tower: Callable[[str], str], png: Callable[[int], bytes]
) -> None:
    """It has no CLS token, so none may be dropped; its pictures are squeezed to a square, not cropped."""
    folder = tower(name)
    pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(decode(png(2), where="x"), return_tensors="pt")
    assert pixels["pixel_values"].shape[-2:] == (TOWERS[name].image, TOWERS[name].image)
    with torch.inference_mode():
        stock = SiglipVisionModel.from_pretrained(folder).eval()(pixels["pixel_values"], output_hidden_states=True)
    expected = stock.last_hidden_state if layer == -1 else stock.hidden_states[layer]
    found = encoder_of(folder, layer=layer).encode_files([png(2)], ["x"])
    assert found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected, rtol=2e-3, atol=2e-3)


def test_the_old_spelling_of_clips_preprocessing_is_the_new_one(tower: Callable[[str], str], png: Callable[[int], bytes]) -> None:
    folder = Path(tower("openai/clip-vit-large-patch14-336"))
    before = encoder_of(str(folder)).preprocess
    new = {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336},
        "do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255,
    }  # fmt: skip
    kept = {key: value for key, value in clip(336).items() if key not in ("feature_extractor_type", "size", "crop_size")}
    path = folder / "preprocessor_config.json"
    try:
        path.write_text(json.dumps({**kept, **new}))
        after = encoder_of(str(folder)).preprocess
    finally:
        path.write_text(json.dumps(clip(336)))
    assert before.describe() == after.describe()
    assert (before(png(3), where="x") == after(png(3), where="x")).all()


def test_a_processor_of_another_size_than_the_tower_is_one_line(tower: Callable[[str], str], png: Callable[[int], bytes]) -> None:
    folder = Path(tower("google/siglip2-base-patch32-256"))
    path = folder / "preprocessor_config.json"
    try:
        path.write_text(json.dumps(siglip(224)))
        with pytest.raises(PipelineError, match="224") as caught:
            encoder_of(str(folder)).encode_files([png(1)], ["x"])
    finally:
        path.write_text(json.dumps(siglip(256)))
    assert len(caught.value.line().splitlines()) == 1


def test_a_flexible_siglip2_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(siglip(256)))
    with pytest.raises(PipelineError, match="is a siglip2 model, which takes packed patches") as caught:
        encoder_of(str(tmp_path))
    assert len(caught.value.line().splitlines()) == 1
