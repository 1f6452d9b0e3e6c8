"""Tiny random models, tokenizers with three kinds of chat template and a small data set, built once a session, offline.

`world` puts them together: a dozen records over six pictures, tokenised, with their features in a store.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.store.store import FeatureStore
from pipeline.records.formats import RowPolicy, SourceSpec, open_source
from pipeline.records.images import ImageRoot
from pipeline.records.record import Record
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import TokenTable, write_tokens
from pipeline.text.tokenization import RowTokenizer, Summary, tokenize
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.language_model import load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

settings.register_profile("repeatable", derandomize=True, database=None)  # the same examples on every machine and day
settings.load_profile("repeatable")

PATCHES, WIDTH, HIDDEN = 16, 32, 32  # P, Dv, D of every tiny model here
CPU = torch.device("cpu")

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (  # a system turn of its own where the conversation has none
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, seek=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.seek and message.role == 'user' %}
        {%- set ns.seek = false %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role in ['user', 'system'] %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- else %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last and loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + content }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

CORPUS = [
    "What is this? It is a red circle. Which colour is the shape? Blue. Is there a square? Yes. No, there is none.",
    "user assistant system You are a helpful assistant. You answer briefly. Describe the image. A yellow triangle.\n\n",
]


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one family of models writes a conversation."""

    template: str
    image_token: str
    default_system: str = ""
    think: str = ""


DIALECTS = {
    "embedded": Dialect(CHATML, "<image>"),
    "smollm2": Dialect(SMOLLM2, "<file_sep>", default_system="You are a helpful assistant."),
    "qwen3": Dialect(QWEN3, "<|image_pad|>", think="<think>\n\n</think>\n\n"),
}


def train_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 300 tokens with the added tokens of its family."""
    qwen = name == "qwen3"
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", DIALECTS[name].image_token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if qwen else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=[] if qwen else first, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if qwen:  # as Qwen3's: all added tokens behind the vocabulary, some not special, some foreign to the template
        tokenizer.add_special_tokens(first)
        plain = ["<tool_call>", "<|fim_prefix|>", "<think>", "</think>"]
        tokenizer.add_tokens([AddedToken(text, normalized=False) for text in plain])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=DIALECTS[name].template, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of `DIALECTS`, holding a tokenizer and its chat template."""
    folders = {name: tmp_path_factory.mktemp(f"tokenizer-{name}") for name in DIALECTS}
    for name, folder in folders.items():
        train_tokenizer(name).save_pretrained(folder)
    return folders


@pytest.fixture(scope="session")
def builders(tokenizer_folders: dict[str, Path]) -> dict[str, PromptBuilder]:
    """A prompt builder for each of `DIALECTS`, three placeholders an image."""
    return {
        name: PromptBuilder(str(folder), image_token=DIALECTS[name].image_token, tokens=3)
        for name, folder in tokenizer_folders.items()
    }


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers (a first, a middle, a last) with the embedded dialect's tokenizer."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = train_tokenizer("embedded")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def moe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of four experts, with a router loss of its own."""
    folder = tmp_path_factory.mktemp("moe")
    torch.manual_seed(2)
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=HIDDEN, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        router_aux_loss_coef=0.5, max_position_embeddings=512, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A CLIP (with a CLS token) and a SigLIP (without) of 16 patches × 32, each with its image processor."""
    shape = {
        "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "patch_size": 8, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(3)
    towers = {
        "clip": (
            CLIPVisionModel(CLIPVisionConfig(**shape, projection_dim=16)),
            CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        ),
        "siglip": (SiglipVisionModel(SiglipVisionConfig(**shape)), SiglipImageProcessorPil(size={"height": 32, "width": 32})),
    }
    folders = {}
    for name, (tower, processor) in towers.items():
        folders[name] = tmp_path_factory.mktemp(name)
        tower.save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def encoders(vision_folders: dict[str, Path]) -> dict[str, Encoder]:
    return {name: Encoder(str(folder), precision="float32", device=CPU, batch=4) for name, folder in vision_folders.items()}


@pytest.fixture(scope="session")
def png() -> Callable[[int], bytes]:
    """A PNG of random 40×32 pixels that follows from a number."""

    def make(seed: int) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    return make


def row(question: str, answer: str, *images: str) -> dict[str, object]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images)}


ROWS = [
    row("<image>\nWhat is this?", "It is a red circle.", "0.png"),
    row("What is this?<image>", "A square.", "1.png"),
    row("<image><image> Which colour is the shape?", "Blue.", "2.png", "3.png"),
    row("Is there a <image> in this <image>?", "Yes.", "4.png", "4.png"),  # one picture twice in a row
    row("You answer briefly.", "No, there is none."),
    row("<image>\nDescribe the image.", "A yellow triangle.", "5.png"),
    row("<image>\nDescribe the image.", "A blue circle.", "0.png"),  # a picture of another row again
    row("<image>\nWhat is this?", "It is none.", "0.png"),  # the first row's prompt again
    {
        "messages": [
            {"role": "system", "content": "You answer briefly."},
            *row("<image>\nWhat is this?", "A circle.")["messages"],
            *row("And this? <image>", "A red square, there is none.")["messages"],
        ],
        "images": ["1.png", "2.png"],
    },
    row("Is there a square?", "Yes."),
    row("<image>", "Blue.", "3.png"),
]


@dataclass(frozen=True, slots=True)
class World:
    """A data set with everything made from it."""

    folder: Path
    images: ImageRoot
    clip: Encoder
    builder: PromptBuilder
    table: TokenTable
    store: FeatureStore
    llm: Path

    def tokens(self, rows: Sequence[dict[str, object]], name: str) -> TokenTable:
        """The token table of other rows over the same pictures."""
        records = self.folder / f"{name}.jsonl"
        records.write_text("".join(json.dumps(row) + "\n" for row in rows))
        tokenizer = RowTokenizer(self.builder, self.images, 256, "stop")
        batches = tokenize(read_records(records), tokenizer, Summary(), workers=1, progress=len_of)
        write_tokens(self.folder / f"{name}.arrow", batches, self.builder.spec())
        return TokenTable(self.folder / f"{name}.arrow")

    def model(self, train: str = "projector", *, kind: str = "mlp", llm: Path | None = None) -> VisionLanguageModel:
        """A fresh model, always with the same weights, frozen as `train` says."""
        torch.manual_seed(4)
        model = VisionLanguageModel(build_projector(kind, WIDTH, HIDDEN), load_language_model(str(llm or self.llm)))
        freeze(model, train)
        return model


def len_of(count: int) -> int:
    return count


def read_records(path: Path, *, limit: int = 0) -> Iterator[Record]:
    """The records of a file, none of which may be bad."""
    return RowPolicy("stop", 0).keep(open_source(SourceSpec(str(path), limit=limit)).records())


@pytest.fixture(scope="session")
def world(
    tmp_path_factory: pytest.TempPathFactory, llm_folder: Path, encoders: dict[str, Encoder], png: Callable[[int], bytes]
) -> World:
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    for number in range(6):
        (folder / "images" / f"{number}.png").write_bytes(png(number))
    images = ImageRoot(folder / "images")
    files, hashes = distinct_images([(images, [f"{number}.png" for number in range(6)])])
    extract(files, hashes, encoders["clip"], stores=[folder / "store"], out=folder / "features", shard_rows=4, workers=0)
    builder = PromptBuilder(str(llm_folder), image_token="<image>", tokens=PATCHES)
    half = World(folder, images, encoders["clip"], builder, None, FeatureStore(folder / "features"), llm_folder)  # type: ignore[arg-type]
    return World(folder, images, half.clip, builder, half.tokens(ROWS, "rows"), half.store, llm_folder)
