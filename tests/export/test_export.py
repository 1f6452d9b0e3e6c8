"""An export is the model that was trained: stock Transformers gives its logits, its ids, its pixels and its answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIALECTS, HIDDEN, PATCHES, WIDTH, World
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from pipeline.core.errors import PipelineError
from pipeline.export import check, proof
from pipeline.export.llava import build_generation_config, check_exportable, write_model
from pipeline.export.marker import write_marker
from pipeline.export.processor import exported_tokenizer, own_template, parts_template, write_processor
from pipeline.export.proof import HeldOut, heldout_rows
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.params.schema import Dataset
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.projector import PROJECTORS, build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

ROOT = Path(__file__).parents[2]

KINDS = ("linear", "mlp", "norm_mlp")


def save(folder: Path, encoder: Encoder, model: VisionLanguageModel, builder: PromptBuilder, *, kind: str, llm: str) -> Path:
    vision = {
        "model": encoder.name, "revision": "", "layer": encoder.layer, "precision": encoder.precision, "spec": encoder.spec(),
    }  # fmt: skip
    shape = {"kind": kind, "width": encoder.width, "hidden": model.hidden_size}
    manifest = Manifest(vision, {"model": llm, "revision": "", "image_token": builder.image_token}, shape, own_llm=True)
    checkpoint.save(folder, model, manifest, builder)
    return folder


def write(source: Source, folder: Path, dtype: str = "float32") -> Path:
    folder.mkdir()
    write_model(source, folder, dtype)
    write_processor(source, folder)
    write_marker(folder, source.manifest, dtype=dtype)
    return folder


@pytest.fixture(scope="module")
def sources(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        kind: Source.open(
            save(folder / kind, world.clip, world.model("all", kind=kind), world.builder, kind=kind, llm=str(world.llm))
        )
        for kind in KINDS
    }


@pytest.fixture(scope="module")
def exports(sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {kind: write(source, folder / kind) for kind, source in sources.items()}


@pytest.fixture(scope="module")
def rows(world: World) -> list[HeldOut]:
    return heldout_rows(Dataset(records=str(world.folder / "rows.jsonl"), images=str(world.images.path)), 4)


def largest_difference(source: Source, export: Path, rows: list[HeldOut], tmp_path: Path) -> float:
    """Stock ids must be ours; the largest difference of logits at answer tokens."""
    model, processor, wrong = check.load(export)
    assert not wrong
    worst = 0.0
    for row in rows:
        ids, keep, expected = proof.pipeline_logits(source, row.record.turns, proof.exact_features(source, row.pictures))
        images = []
        for data in row.pictures:
            (tmp_path / "picture.png").write_bytes(data)
            images.append(Image.open(tmp_path / "picture.png").copy())
        messages = proof.messages_of(row.record.turns, source.builder.image_token)
        inputs = processor(text=processor.apply_chat_template(messages), images=images, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids
        found = check.logits_of(model, inputs["pixel_values"], ids, keep)
        worst = max(worst, float((found - expected).abs().max()))
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_stock_transformers_gives_the_pipelines_ids_and_logits(
    kind: str, sources: dict[str, Source], exports: dict[str, Path], rows: list[HeldOut], tmp_path: Path
) -> None:
    assert len(rows) == 4
    assert largest_difference(sources[kind], exports[kind], rows, tmp_path) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_projector_is_bit_equal_in_bfloat16(kind: str, sources: dict[str, Source], exports: dict[str, Path]) -> None:
    exported = AutoModelForImageTextToText.from_pretrained(exports[kind], dtype=torch.bfloat16).model.multi_modal_projector
    own = build_projector(kind, WIDTH, HIDDEN)
    own.load_state_dict(sources[kind].model.projector.state_dict())
    features = torch.randn(3, PATCHES, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(exported(features), own.to(torch.bfloat16)(features))


def test_a_mixture_of_experts_is_exported_exactly(world: World, moe_folder: Path, rows: list[HeldOut], tmp_path: Path) -> None:
    model = world.model("all", llm=moe_folder)
    source = Source.open(save(tmp_path / "moe", world.clip, model, world.builder, kind="mlp", llm=str(moe_folder)))
    assert largest_difference(source, write(source, tmp_path / "out"), rows[:2], tmp_path) <= 1e-5


def test_bfloat16_weights_are_those_of_the_rounded_model(sources: dict[str, Source], rows: list[HeldOut], tmp_path: Path) -> None:
    source = Source.open(sources["mlp"].folder, dtype="bfloat16")
    export = write(source, tmp_path / "out", "bfloat16")
    assert {tensor.dtype for tensor in load_file(export / "model.safetensors").values()} == {torch.bfloat16}
    assert largest_difference(source, export, rows[:2], tmp_path) <= 1e-5


@pytest.mark.parametrize("size", [(32, 32), (90, 41), (33, 200), (31, 32), (7, 9)])
def test_pictures_of_any_size_give_the_same_pixels(
    size: tuple[int, int], sources: dict[str, Source], exports: dict[str, Path], tmp_path: Path
) -> None:
    values = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    processor = AutoProcessor.from_pretrained(exports["mlp"], backend="pil")
    found = processor(text="<image>", images=Image.open(tmp_path / "picture.png"), return_tensors="pt")["pixel_values"][0]
    ours = sources["mlp"].encoder.preprocess
    pixels = torch.from_numpy(ours((tmp_path / "picture.png").read_bytes(), where="here"))
    mean, std = torch.tensor(processor.image_processor.image_mean), torch.tensor(processor.image_processor.image_std)
    back = (found * std[:, None, None] + mean[:, None, None]) / ours.rescale
    assert torch.equal(back.round().to(torch.uint8), pixels)


def test_the_folder_says_what_readers_look_for(sources: dict[str, Source], exports: dict[str, Path]) -> None:
    names = set(load_file(exports["mlp"] / "model.safetensors"))
    assert "language_model.model.embed_tokens.weight" in names
    assert "language_model.lm_head.weight" not in names  # tied
    assert "vision_tower.vision_model.embeddings.class_embedding" in names
    assert {name for name in names if "projector" in name} == {
        f"multi_modal_projector.linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")
    }
    config = json.loads((exports["mlp"] / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert (config["image_seq_length"], config["vision_feature_layer"]) == (PATCHES, -1)
    assert str(sources["mlp"].folder.parent) not in json.dumps(config)
    for name in ("processor_config.json", "preprocessor_config.json"):
        assert json.loads((exports["mlp"] / name).read_text())["processor_class"] == "LlavaProcessor"
    assert AutoConfig.from_pretrained(exports["norm_mlp"]).architectures == ["VipLlavaForConditionalGeneration"]


def test_generation_ends_at_the_end_of_a_turn_and_never_says_the_placeholder(
    sources: dict[str, Source], exports: dict[str, Path]
) -> None:
    builder = sources["mlp"].builder
    found = GenerationConfig.from_pretrained(exports["mlp"])
    assert found.eos_token_id == [builder.end_id]
    assert found.suppress_tokens == [builder.image_id]
    assert not found.do_sample
    habits = sources["mlp"].language_model.generation_config
    before, habits.eos_token_id = habits.eos_token_id, [0, builder.end_id]
    try:
        assert build_generation_config(sources["mlp"]).eos_token_id == [builder.end_id, 0]
    finally:
        habits.eos_token_id = before


@pytest.mark.parametrize("dialect", sorted(DIALECTS))
def test_the_template_takes_text_and_parts_and_is_the_models_own(dialect: str, builders: dict[str, PromptBuilder]) -> None:
    tokenizer, token = builders[dialect].tokenizer, DIALECTS[dialect].image_token
    template = parts_template(tokenizer.chat_template, image_token=token, options=builders[dialect].options)
    assert own_template(template) == tokenizer.chat_template
    talk = [{"role": "user", "content": f"{token}\nWhat is this?"}, {"role": "assistant", "content": "It is a red circle."}]
    more = [*talk, {"role": "user", "content": "And this?"}]
    own = tokenizer.apply_chat_template(more, tokenize=False, add_generation_prompt=True, **builders[dialect].options)
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    for first in (talk[0]["content"], parts, [parts[0], {"type": "text", "text": "\nWhat is this?"}]):
        said = [
            {"role": "user", "content": first},
            *more[1:-1],
            {"role": "user", "content": [{"type": "text", "text": "And this?"}]},
        ]
        assert tokenizer.apply_chat_template(said, chat_template=template, tokenize=False, add_generation_prompt=True) == own
    with pytest.raises(Exception, match="a part is of type video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], chat_template=template)


def test_a_word_as_placeholder_does_not_merge_with_itself(world: World, tmp_path: Path) -> None:
    builder = PromptBuilder(str(world.llm), image_token="s", tokens=PATCHES)
    source = Source.open(save(tmp_path / "m", world.clip, world.model("all"), builder, kind="mlp", llm=str(world.llm)))
    tokenizer = exported_tokenizer(source)
    assert tokenizer("s" * PATCHES).input_ids == [builder.image_id] * PATCHES
    assert build_generation_config(source).suppress_tokens is None  # it is a word of the language too


def test_a_tokenizer_that_adds_tokens_by_itself_is_told_not_to(world: World, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    builder = PromptBuilder(str(world.llm), image_token="<image>", tokens=PATCHES)
    source = Source.open(save(tmp_path / "m", world.clip, world.model("all"), builder, kind="mlp", llm=str(world.llm)))
    backend = source.builder.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    assert source.builder.tokenizer("What").input_ids[0] == 0
    assert exported_tokenizer(source)("What").input_ids == source.builder.tokenizer("What", add_special_tokens=False).input_ids


def siglip(world: World, vision_folders: dict[str, Path], folder: Path, *, kind: str, layer: int) -> Source:
    encoder = Encoder(str(vision_folders["siglip"]), layer=layer, precision="float32", device=torch.device("cpu"), batch=1)
    return Source.open(save(folder, encoder, world.model("all", kind=kind), world.builder, kind=kind, llm=str(world.llm)))


@pytest.mark.parametrize("layer", [2, -2])
def test_siglip_is_exported_exactly_before_its_last_layernorm(
    layer: int, world: World, vision_folders: dict[str, Path], rows: list[HeldOut], tmp_path: Path
) -> None:
    source = siglip(world, vision_folders, tmp_path / "m", kind="mlp", layer=layer)
    assert largest_difference(source, write(source, tmp_path / "out"), rows[:2], tmp_path) <= 1e-5


@pytest.mark.parametrize(("kind", "layer", "words"), [("mlp", -1, "vision.layer: 2 "), ("norm_mlp", 2, "drops an encoder's first")])
def test_siglip_is_refused_where_no_class_is_exact(
    kind: str, layer: int, words: str, world: World, vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(PipelineError, match=words):
        check_exportable(siglip(world, vision_folders, tmp_path / "m", kind=kind, layer=layer))


@pytest.mark.parametrize("kind", sorted(set(PROJECTORS) - set(KINDS)))
def test_a_projector_that_llava_has_no_place_for_is_refused(kind: str, world: World, tmp_path: Path) -> None:
    model = save(tmp_path / "m", world.clip, world.model("all", kind=kind), world.builder, kind=kind, llm=str(world.llm))
    with pytest.raises(PipelineError, match=f"no place for a projector of kind {kind}"):
        write(Source.open(model), tmp_path / "out")


def test_an_export_that_is_not_the_model_is_refused(
    sources: dict[str, Source], exports: dict[str, Path], rows: list[HeldOut], tmp_path: Path
) -> None:
    shutil.copytree(exports["mlp"], tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"] += 0.01
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    (tmp_path / "work").mkdir()
    expected = proof.ask(sources["mlp"], rows[:1], tmp_path / "work", max_new_tokens=4)
    check.main(str(tmp_path / "out"), tmp_path / "work")
    with pytest.raises(PipelineError, match=r"logits differ .* nothing was written"):
        proof.compare(sources["mlp"], rows[:1], tmp_path / "work", expected, max_new_tokens=4)
    check.main(str(exports["mlp"]), tmp_path / "work")
    assert proof.compare(sources["mlp"], rows[:1], tmp_path / "work", expected, max_new_tokens=4).largest <= 1e-5
