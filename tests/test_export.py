"""An export is the model that was trained: stock Transformers gives its logits, its ids, its pixels and its answers."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DIALECTS, HIDDEN, PATCHES, WIDTH, World, read_records
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from pipeline import checkpoint
from pipeline.answering import Assistant, Conversation, Sampling
from pipeline.checkpoint import Manifest
from pipeline.errors import PipelineError
from pipeline.export import check, proof
from pipeline.export.card import commit, lineage
from pipeline.export.llava import build_generation_config, check_exportable, write_model
from pipeline.export.marker import check_target, write_marker
from pipeline.export.processor import exported_tokenizer, own_template, parts_template, write_processor
from pipeline.export.proof import HeldOut, heldout_rows
from pipeline.export.publish import check_repository
from pipeline.export.source import Source
from pipeline.model import VisionLanguageModel, build_projector, hidden_size, load_language_model
from pipeline.params import Dataset
from pipeline.text import PromptBuilder
from pipeline.vision import Encoder

ROOT = Path(__file__).parent.parent
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


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.export", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded encoder and language model with a projector that has learnt nothing: a model without training."""
    clip, llm = ROOT / "data/models/clip", ROOT / "data/models/llm"
    encoder = Encoder(str(clip), device=torch.device("cpu"), batch=1)
    builder = PromptBuilder(str(llm), image_token="<image>", tokens=encoder.tokens)
    language_model = load_language_model(str(llm))
    torch.manual_seed(5)
    projector = build_projector("mlp", encoder.width, hidden_size(language_model))
    folder = tmp_path_factory.mktemp("embedded") / "model"
    return save(folder, encoder, VisionLanguageModel(projector, language_model), builder, kind="mlp", llm=str(llm))


def same_answers(folder: Path, export: Path, count: int, tmp_path: Path) -> int:
    """How many of `count` held-out questions of the embedded world stock Transformers answers as `pipeline.chat`."""
    from pipeline.images import ImageRoot

    assistant, root = Assistant(folder, device="cpu"), ImageRoot(ROOT / "data/easyvqa/images.zip")
    model, processor, _ = check.load(export)
    same = 0
    for record in read_records(ROOT / "data/easyvqa/questions_heldout.jsonl", limit=count):
        picture = tmp_path / "picture.png"
        picture.write_bytes(root.read(record.images[0]))
        question, talk = HeldOut(record, []).question, Conversation()
        assistant.ask(talk, question, assistant.look(picture))
        own = "".join(assistant.answer(talk, Sampling(max_new_tokens=16)))
        parts = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
        found = check.answer(model, processor, [{"role": "user", "content": parts}], max_new_tokens=16)
        same += found.strip() == own.strip()
    return same


def test_the_command_exports_proves_and_replaces_only_its_own(embedded: Path, tmp_path: Path) -> None:
    done = run(str(embedded), str(tmp_path / "out"), "--rows", "2")
    assert done.returncode == 0, done.stderr
    assert "LlavaForConditionalGeneration" in done.stdout
    card = (tmp_path / "out/README.md").read_text()
    assert commit(ROOT) in card
    assert "pipeline_tag: image-text-to-text" in card
    assert not list(tmp_path.glob(".*"))
    check_target(tmp_path / "out")  # an earlier export may be replaced
    assert same_answers(embedded, tmp_path / "out", 20, tmp_path) == 20


@pytest.mark.slow
def test_stock_transformers_answers_500_heldout_questions_as_chat_does(embedded: Path, tmp_path: Path) -> None:
    trained = ROOT / "models/sft"
    folder = trained if (trained / checkpoint.MANIFEST).is_file() else embedded
    assert same_answers(folder, write(Source.open(folder), tmp_path / "out"), 500, tmp_path) == 500


@pytest.mark.parametrize(
    ("prepare", "arguments", "words"),
    [
        (lambda _: None, ["elsewhere"], "elsewhere: no trained model here"),
        (lambda folder: (folder / "out").write_text("x"), ["models/sft"], "out: is a file -> name a new folder"),
        (lambda folder: (folder / "out/mine").mkdir(parents=True), ["models/sft"], "is not empty and not an earlier export"),
    ],
)
def test_a_wrong_folder_is_one_line(prepare: Callable[[Path], object], arguments: list[str], words: str, tmp_path: Path) -> None:
    prepare(tmp_path)
    done = run(*arguments, str(tmp_path / "out"))
    assert done.returncode in (2, 4)
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("name", "words"), [("me/model", "HF_HUB_OFFLINE=0"), ("a/b/c", "OWNER/NAME")])
def test_an_upload_that_cannot_succeed_is_told_before_the_work(name: str, words: str) -> None:
    with pytest.raises(PipelineError, match=words):
        check_repository(name)


def test_rows_without_pictures_prove_nothing(world: World, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk, "images": []}))
    with pytest.raises(PipelineError, match="no row with a picture"):
        heldout_rows(Dataset(records=str(tmp_path / "rows.jsonl"), images=str(world.images.path)), 4)


def test_the_card_follows_a_folder_to_the_stages_that_made_it(tmp_path: Path) -> None:
    stages = {
        "other": {"outs": [{"path": "other"}]},
        "pretrain": {"outs": [{"path": "models/pretrain"}], "params": {"params.yaml": {"pretrain": {"lr": 1}}}},
        "sft": {"deps": [{"path": "models/pretrain"}], "outs": [{"path": "models/sft"}]},
    }
    (tmp_path / "dvc.lock").write_text(json.dumps({"stages": stages}))
    assert list(lineage(tmp_path / "models/sft", tmp_path)) == ["pretrain", "sft"]
    assert lineage(tmp_path / "models/mine", tmp_path) == {}
    assert lineage(tmp_path / "models/sft", tmp_path / "nowhere") == {}
