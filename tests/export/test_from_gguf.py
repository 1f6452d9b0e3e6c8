"""A language model in GGUF comes back as the Transformers model it was written from, or as an error of one line."""

import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from conftest import DIALECTS, PATCHES, WIDTH, World, train_tokenizer
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from typer import Typer
from typer.testing import CliRunner

from pipeline.core.errors import PipelineError
from pipeline.export.from_gguf import convert, from_gguf
from pipeline.export.llamacpp import SPLITS, write_gguf
from pipeline.export.source import Source
from pipeline.records.record import ImageSlot, Turn
from pipeline.text.builder import PromptBuilder
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.language_model import load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

FAMILIES: dict[str, Any] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    **{
        name: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        for pattern, name in SPLITS.items()
    },
}
TEXTS = [
    "What is 2024's colour?\n\nIt's red,  blue & naïve — 12345",
    "in  7 shapes,\tcode…  ",
    "don't <|im_end|>ok <think>",
    "5  50",
]


def written(world: World, folder: Path, family: str, cut: str, dialect: str, *, tied: bool) -> Source:
    """A random model of a family, and `folder`/model.gguf."""
    tokenizer = train_tokenizer(dialect)
    tokenizer.backend_tokenizer.pre_tokenizer = CUTS[cut]
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(6)
    config = FAMILIES[family](
        vocab_size=len(tokenizer) + 8, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=tied, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    language_model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at zero, which would hide a missing one
        for name, parameter in language_model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    language_model.save_pretrained(folder / "llm")
    builder = PromptBuilder(str(folder / "llm"), image_token=DIALECTS[dialect].image_token, tokens=PATCHES)
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "float32", "spec": world.clip.spec()}
    llm = {"model": str(folder / "llm"), "revision": "", "image_token": builder.image_token}
    manifest = Manifest(vision, llm, {"kind": "mlp", "width": WIDTH, "hidden": 64}, own_llm=True)
    checkpoint.save(folder / "m", VisionLanguageModel(build_projector("mlp", WIDTH, 64), language_model), manifest, builder)
    source = Source.open(folder / "m")
    write_gguf(source, folder, dtype="float32")
    return source


@pytest.mark.parametrize(
    ("family", "cut", "dialect", "tied"),
    [
        ("llama", "gpt-2", "embedded", True),
        ("llama", "smollm", "smollm2", True),
        ("llama", "llama-bpe", "embedded", False),
        ("qwen2", "qwen2", "qwen3", False),
        ("qwen3", "qwen2", "qwen3", True),
    ],
)
def test_a_language_model_comes_back_bit_for_bit_with_its_tokenizer(
    family: str, cut: str, dialect: str, tied: bool, world: World, tmp_path: Path
) -> None:
    source = written(world, tmp_path, family, cut, dialect, tied=tied)
    said = convert(tmp_path / "model.gguf", tmp_path / "back")
    assert f"llm.model: {tmp_path / 'back'}" in said[1]
    assert DIALECTS[dialect].image_token in said[1]
    found, expected = load_language_model(str(tmp_path / "back")), source.language_model
    assert type(found) is type(expected)
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    builder = PromptBuilder(str(tmp_path / "back"), image_token=DIALECTS[dialect].image_token, tokens=PATCHES)
    own = source.builder
    for text in TEXTS:
        assert builder.tokenizer(text).input_ids == own.tokenizer(text).input_ids
    turns = [Turn("user", (ImageSlot(0), f"\n{TEXTS[0]}")), Turn("assistant", (TEXTS[2],))]
    assert builder.build(turns).ids.tolist() == own.build(turns).ids.tolist()
    assert builder.build(turns).spans == own.build(turns).spans
    assert (builder.end_id, builder.control) == (own.end_id, own.control)


def test_the_number_format_can_be_chosen(world: World, tmp_path: Path) -> None:
    source = written(world, tmp_path, "llama", "gpt-2", "embedded", tied=True)
    convert(tmp_path / "model.gguf", tmp_path / "back", dtype="bfloat16")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    table: Any = found.get_input_embeddings().weight
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, source.language_model.get_input_embeddings().weight.to(torch.bfloat16))


@pytest.fixture(scope="module")
def file(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    written(world, folder, "llama", "gpt-2", "embedded", tied=True)
    return folder / "model.gguf"


def rewritten(file: Path, target: Path, change: dict[str, Any], *, without: str = "", extra: bool = False) -> Path:
    """The same file with some metadata changed; texts only."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, change.get("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", without, *change):
            continue
        kind, *of = field.types
        writer.add_key_value(name, field.contents(), kind, *of)
    for name, value in change.items():
        if name != "general.architecture":
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    if extra:
        writer.add_tensor("rope_freqs.weight", reader.tensors[0].data[:1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "another family": ({"general.architecture": "mamba"}, "holds a mamba model, expected one of llama, qwen2, qwen3"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, "its tokenizer (llama, gpt-2) is not rebuilt here"),
    "another cut": ({"tokenizer.ggml.pre": "deepseek-llm"}, "its tokenizer (gpt2, deepseek-llm) is not rebuilt here"),
    "scaled positions": ({"llama.rope.scaling.type": "yarn"}, "scales its rotary positions"),
    "a part": ({"split.count": 3}, "is one of 3 parts"),
    "experts": ({"llama.expert_count": 8}, "is a mixture of experts"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_would_not_come_back_exactly_is_refused(file: Path, tmp_path: Path, case: str) -> None:
    change, words = CHANGES[case]
    refused(rewritten(file, tmp_path / "x.gguf", change), tmp_path, words)


def test_a_file_without_a_chat_template_or_with_a_tensor_too_many_is_refused(file: Path, tmp_path: Path) -> None:
    refused(rewritten(file, tmp_path / "x.gguf", {}, without="tokenizer.chat_template"), tmp_path, "has no chat template")
    refused(rewritten(file, tmp_path / "y.gguf", {}, extra=True), tmp_path, "scales its rotary positions")
    convert(rewritten(file, tmp_path / "z.gguf", {}), tmp_path / "out")  # the same file unchanged is taken


def refused(file: Path, folder: Path, words: str) -> None:
    with pytest.raises(PipelineError) as caught:
        convert(file, folder / "out")
    assert words in caught.value.line()
    assert len(caught.value.line().splitlines()) == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("size", "words"), [(0, "not a GGUF file"), (100, "cut off"), (60_000, "cut off")])
def test_a_damaged_file_is_refused(file: Path, tmp_path: Path, size: int, words: str) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:size])
    refused(tmp_path / "cut.gguf", tmp_path, words)


def test_the_projectors_file_is_no_language_model(file: Path, tmp_path: Path) -> None:
    refused(file.with_name("mmproj.gguf"), tmp_path, "holds a clip model")


def test_a_mistake_on_the_command_line_is_one_line(file: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(from_gguf)
    (tmp_path / "mine").mkdir()
    shutil.copy(file, tmp_path / "mine")
    for arguments, words in (
        ((tmp_path / "none.gguf", tmp_path / "out"), "none.gguf: no such file -> give a GGUF file"),
        ((file, tmp_path / "mine"), "is there already"),
        ((file.parent, tmp_path / "out"), "no such file"),
    ):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
