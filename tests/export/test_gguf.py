"""GGUF files for llama.cpp: tensors as they were, metadata as its LLaVA code expects, refusal of what it cannot run.

Where xllamacpp (llama.cpp as a package) is installed, its numbers are compared with Transformers' too.
"""

import base64
import json
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import DIALECTS, PATCHES, WIDTH, World, train_tokenizer
from gguf import GGUFReader
from test_export import ROOT, save
from tokenizers import Regex, pre_tokenizers
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen3Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.clip.modeling_clip import CLIPMLP

from pipeline.core.errors import PipelineError
from pipeline.export import llamacpp
from pipeline.export.llamacpp import check_runnable, split_name, write_gguf
from pipeline.export.proof import exact_features
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.records.record import ImageSlot, Turn
from pipeline.text.builder import Prompt, PromptBuilder
from pipeline.vlm.model.language_model import hidden_size, load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

FAMILIES: dict[str, type[PreTrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
TEXT = "What is 2024's colour?\n\nIt's red,  blue & naïve — 12345 Ünï\tcode… don't <|im_end|>ok<image>"
QWEN2, LLAMA3 = llamacpp.SPLITS
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]),
    **{
        name: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        for name, pattern in (("qwen2", QWEN2), ("llama-bpe", LLAMA3))
    },
}


@pytest.fixture(scope="module")
def source(world: World, tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("gguf-source") / "model"
    return Source.open(save(folder, world.clip, world.model("all"), world.builder, kind="mlp", llm=str(world.llm)))


@pytest.fixture(scope="module")
def written(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    assert write_gguf(source, folder, dtype="float32") == ["model.gguf", "mmproj.gguf"]
    return folder


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    found = GGUFReader(path).tensors
    return {t.name: torch.tensor(t.data).reshape(tuple(reversed(t.shape.tolist()))) for t in found}


def test_the_projector_file_describes_the_tower_as_llama_cpp_reads_it(written: Path, source: Source) -> None:
    found = fields(written / "mmproj.gguf")
    expected = {
        "general.architecture": "clip", "clip.projector_type": "mlp",
        "clip.has_vision_encoder": True, "clip.has_llava_projector": True,
        "clip.vision.image_size": 32, "clip.vision.patch_size": 8, "clip.vision.embedding_length": WIDTH,
        "clip.vision.block_count": 2, "clip.vision.feature_layer": [2],
        "clip.vision.attention.head_count": 2, "clip.use_gelu": False,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["clip.vision.image_mean"] == pytest.approx(source.encoder.preprocess.mean)


def test_tower_and_projector_read_back_as_they_were(written: Path, source: Source) -> None:
    found, tower = tensors(written / "mmproj.gguf"), source.encoder.tower.state_dict()
    assert torch.equal(found["v.patch_embd.weight"], tower["embeddings.patch_embedding.weight"])
    assert torch.equal(found["v.blk.1.ffn_up.weight"], tower["encoder.layers.1.mlp.fc1.weight"])
    assert torch.equal(found["v.blk.1.ffn_down.weight"], tower["encoder.layers.1.mlp.fc2.weight"])
    assert torch.equal(found["mm.0.weight"], source.model.projector[0].weight)
    assert torch.equal(found["mm.2.bias"], source.model.projector[2].bias)
    assert not any("post_ln" in name for name in found)  # the patches never pass it
    assert sum(t.numel() for t in found.values()) == sum(
        t.numel() for name, t in [*tower.items(), *source.model.projector.state_dict().items()] if "post_layernorm" not in name
    )


def test_the_language_model_reads_back_as_it_was(written: Path, source: Source) -> None:
    found, own = tensors(written / "model.gguf"), source.language_model.state_dict()
    assert torch.equal(found["token_embd.weight"], own["model.embed_tokens.weight"])
    assert "output.weight" not in found  # tied
    assert torch.equal(found["blk.2.attn_v.weight"], own["model.layers.2.self_attn.v_proj.weight"])
    heads, query = source.language_model.config.num_attention_heads, own["model.layers.0.self_attn.q_proj.weight"]
    size = query.shape[0] // heads
    for head in range(heads):  # llama.cpp rotates neighbours: dimension i of the first half stands beside i of the second
        rows = found["blk.0.attn_q.weight"][head * size : (head + 1) * size]
        assert torch.equal(rows[0::2], query[head * size : head * size + size // 2])
        assert torch.equal(rows[1::2], query[head * size + size // 2 : (head + 1) * size])


def test_the_tokenizer_is_the_models_own(written: Path, source: Source) -> None:
    found, builder = fields(written / "model.gguf"), source.builder
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert [found["tokenizer.ggml.tokens"].index(token) for token in ("<image>", "<|im_end|>")] == [
        builder.image_id,
        builder.end_id,
    ]
    assert found["tokenizer.ggml.token_type"][builder.image_id] == 3  # control: never printed
    assert found["tokenizer.ggml.eot_token_id"] == builder.end_id
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"].endswith(builder.tokenizer.chat_template)
    assert len(found["tokenizer.ggml.tokens"]) == source.language_model.config.vocab_size


def test_a_deeper_layer_is_left_out_when_features_come_from_an_earlier_one(world: World, tmp_path: Path) -> None:
    encoder = Encoder(world.clip.name, layer=-2, precision="float32", device=torch.device("cpu"), batch=1)
    model = save(tmp_path / "m", encoder, world.model("all"), world.builder, kind="mlp", llm=str(world.llm))
    write_gguf(Source.open(model), tmp_path, dtype="float32")
    assert fields(tmp_path / "mmproj.gguf")["clip.vision.feature_layer"] == [1]
    assert not any(name.startswith("v.blk.1.") for name in tensors(tmp_path / "mmproj.gguf"))


def test_half_precision_is_for_matrices_only(source: Source, tmp_path: Path) -> None:
    write_gguf(Source.open(source.folder, dtype="float16"), tmp_path, dtype="float16")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize(
    ("kind", "words"),
    [("linear", "always has GELU"), ("norm_mlp", "no projector with a LayerNorm first"), ("mlp3x", "knows two layers")],
)
def test_projectors_that_llama_cpp_computes_otherwise_are_refused(kind: str, words: str, world: World, tmp_path: Path) -> None:
    model = save(tmp_path / "m", world.clip, world.model("all", kind=kind), world.builder, kind=kind, llm=str(world.llm))
    with pytest.raises(PipelineError, match=words):
        check_runnable(Source.open(model))


def test_a_language_model_without_a_gguf_layout_is_refused(world: World, moe_folder: Path, tmp_path: Path) -> None:
    model = save(tmp_path / "m", world.clip, world.model("all", llm=moe_folder), world.builder, kind="mlp", llm=str(moe_folder))
    with pytest.raises(PipelineError, match="qwen3_moe cannot be written as GGUF here"):
        check_runnable(Source.open(model))


def cut_as(source: Source, cut: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = source.builder.tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = cut
    return tokenizer


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(r"\d+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(cut: pre_tokenizers.PreTokenizer, source: Source) -> None:
    before = source.builder.tokenizer.backend_tokenizer.pre_tokenizer
    try:
        cut_as(source, cut)
        with pytest.raises(PipelineError, match="would cut text otherwise"):
            split_name(source)
    finally:
        cut_as(source, before)
    assert split_name(source) == "gpt-2"


class Llama:
    """llama.cpp's own server, in this process."""

    def __init__(self, folder: Path) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path, params.mmproj.path = str(folder / "model.gguf"), str(folder / "mmproj.gguf")
        params.n_ctx, params.n_parallel, params.warmup, params.mmproj_use_gpu, params.verbosity = 512, 1, False, False, -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def post(self, path: str, content: dict[str, Any]) -> Any:
        request = Request(self.server.listening_address + path, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def next_tokens(self, ids: list[int]) -> dict[int, float]:
        """Log-probabilities of the five likeliest tokens to follow."""
        # A full stop is what it says then: a token that is half a letter it would hold back. The probabilities are those before.
        asked = {"prompt": ids, "n_predict": 1, "n_probs": 5, "temperature": 0, "logit_bias": [[".", 1000]]}
        return {t["id"]: t["logprob"] for t in self.post("/completion", asked)["completion_probabilities"][0]["top_logprobs"]}

    def next_tokens_about(self, picture: Path, question: str) -> dict[int, float]:
        """The same for the first token of an answer about a picture."""
        url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1, "logprobs": True, "top_logprobs": 5}
        answer = self.post("/v1/chat/completions", asked | {"temperature": 0})
        return {t["id"]: t["logprob"] for t in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@pytest.mark.parametrize(
    ("family", "cut", "dialect"),
    [
        ("llama", "gpt-2", "embedded"),
        ("llama", "smollm", "smollm2"),
        ("llama", "llama-bpe", "embedded"),
        ("qwen2", "qwen2", "qwen3"),
        ("qwen3", "qwen2", "qwen3"),
    ],
)
def test_llama_cpp_gives_the_same_prompt_ids_and_probabilities(
    family: str, cut: str, dialect: str, world: World, tmp_path: Path
) -> None:
    tokenizer = train_tokenizer(dialect)
    tokenizer.backend_tokenizer.pre_tokenizer = CUTS[cut]
    tokenizer.save_pretrained(tmp_path / "llm")
    torch.manual_seed(6)
    config = FAMILIES[family](
        vocab_size=len(tokenizer) + 8, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False, initializer_range=0.2,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    language_model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases start at zero, which would hide a missing one
        for name, parameter in language_model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    language_model.save_pretrained(tmp_path / "llm")
    builder = PromptBuilder(str(tmp_path / "llm"), image_token=DIALECTS[dialect].image_token, tokens=PATCHES)
    model = VisionLanguageModel(build_projector("mlp", WIDTH, 64), language_model)
    source = Source.open(save(tmp_path / "m", world.clip, model, builder, kind="mlp", llm=str(tmp_path / "llm")))
    write_gguf(source, tmp_path, dtype="float32")
    assert fields(tmp_path / "model.gguf")["tokenizer.ggml.pre"] == cut
    llama = Llama(tmp_path)
    asked = [{"role": "user", "content": "What is this?"}]
    prompt = builder.build_question([Turn("user", ("What is this?",))])
    written = llama.post("/apply-template", {"messages": asked})["prompt"]
    assert llama.post("/tokenize", {"content": written, "parse_special": True})["tokens"] == prompt.ids.tolist()
    ids = builder.tokenizer(TEXT).input_ids
    assert llama.post("/tokenize", {"content": TEXT, "parse_special": True, "add_special": True})["tokens"] == ids
    with torch.inference_mode():
        expected = language_model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = llama.next_tokens(ids)
    assert set(found) == set(expected.topk(5).indices.tolist())
    for token, value in found.items():
        assert value == pytest.approx(float(expected[token]), abs=1e-3)


def test_llama_cpp_sees_what_the_pipeline_sees(tmp_path: Path) -> None:
    """To 0.002, but for two habits of llama.cpp's: GELU in its tanh form, and the CLS token put last (its issue 25814)."""
    clip, llm = ROOT / "data/models/clip", ROOT / "data/models/llm"
    encoder = Encoder(str(clip), device=torch.device("cpu"), batch=1)
    language_model = load_language_model(str(llm))
    torch.manual_seed(5)
    model = VisionLanguageModel(build_projector("mlp", encoder.width, hidden_size(language_model)), language_model)
    builder = PromptBuilder(str(llm), image_token="<image>", tokens=encoder.tokens)
    source = Source.open(save(tmp_path / "m", encoder, model, builder, kind="mlp", llm=str(llm)))
    write_gguf(source, tmp_path, dtype="float32")
    for module in source.encoder.tower.modules():
        if isinstance(module, CLIPMLP):
            module.activation_fn = torch.nn.GELU(approximate="tanh")
    llama, question = Llama(tmp_path), "\nwhat color is the shape?"
    prompt = builder.build_question([Turn("user", (ImageSlot(0), question))])
    for picture in sorted((ROOT / "data/samples").glob("*.png"))[:3]:
        found = llama.next_tokens_about(picture, question)
        sound = exact_features(source, [picture.read_bytes()])
        hook = source.encoder.tower.embeddings.register_forward_hook(cls_last)
        as_it_is = exact_features(source, [picture.read_bytes()])
        hook.remove()
        distances = [distance(source.model, prompt, shown, found) for shown in (sound, as_it_is)]
        assert min(distances) < 2e-3, distances
        assert distance(source.model, prompt, torch.zeros_like(sound), found) > 0.1


def cls_last(embeddings: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
    """What CLIP's layers are given when the CLS token stands behind the patches and positions are counted from 0 all the same."""
    positions = embeddings.position_embedding.weight
    tokens = output - positions
    return torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1) + positions


@torch.inference_mode()
def distance(model: VisionLanguageModel, prompt: Prompt, features: torch.Tensor, found: dict[int, float]) -> float:
    """Largest distance of log-probabilities that were found for what follows a prompt with one picture."""
    ids, start = torch.from_numpy(prompt.ids).long()[None], torch.tensor(prompt.image_starts)
    embedded = model.embed(ids, features, torch.zeros_like(start), start)
    expected = model.language_model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)
    return max(abs(float(expected[token]) - value) for token, value in found.items())
