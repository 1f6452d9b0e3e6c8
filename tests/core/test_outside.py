"""Models from outside: whatever a folder holds, loading it is quick, small, and ends in a model or in one line."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU
from transformers import AutoTokenizer

from pipeline.core.errors import PipelineError
from pipeline.core.loading import read_pretrained
from pipeline.core.outside import MAX_JSON, MAX_VOCABULARY, check_model
from pipeline.features.encoder.encoder import Encoder
from pipeline.vlm.model.language_model import load_language_model

Change = Callable[[Path], object]


def config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        for key in changes:
            for section in ("vision_config", "text_config"):
                if key in content.get(section, {}):
                    content[section][key] = changes[key]
        path.write_text(json.dumps(content | changes))

    return change


def holding(name: str, content: bytes | str) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def sparse(name: str, size: int, start: bytes = b"{") -> Change:
    def change(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return change


def in_place_of(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


HOSTILE: dict[str, Change] = {
    "a list": holding("config.json", "[]"),
    "a number": holding("config.json", "7"),
    "nothing": holding("config.json", ""),
    "deep": holding("config.json", "[" * 200_000),
    "deep objects": holding("config.json", '{"a":' * 200_000),
    "not UTF-8": holding("config.json", b'{"a": "\xff\xfe"}'),
    "UTF-16": holding("config.json", '{"model_type": "llama"}'.encode("utf-16")),
    "huge": sparse("config.json", MAX_JSON + 1),
    "no type": config(model_type=None),
    "a type of its own": config(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}),
    "a type of another kind": config(model_type=["llama"]),
    "sizes as text": config(hidden_size="64"),
    "sizes as lists": config(hidden_size=[64]),
    "a negative size": config(hidden_size=-64),
    "no size": config(hidden_size=0),
    "a fraction": config(hidden_size=64.5),
    "a trillion": config(hidden_size=10**12),
    "as many layers": config(num_hidden_layers=10**9),
    "more layers than weights": config(num_hidden_layers=900, hidden_size=8192),
    "a fractional layer": config(num_hidden_layers=1.5),
    "no heads": config(num_attention_heads=0),
    "an unknown activation": config(hidden_act="os.system"),
    "a directory": in_place_of("config.json"),
    "a directory of weights": in_place_of("model.safetensors"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "empty weights": holding("model.safetensors", b""),
    "weights of noise": holding("model.safetensors", bytes(range(256)) * 20),
    "an endless header": holding("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
    "a header of 100 MB": sparse("model.safetensors", 200 << 20, struct.pack("<Q", 100 << 20) + b"{"),
    "a deep header": holding("model.safetensors", struct.pack("<Q", 200_000) + b"[" * 200_000),
    "pickled weights": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
}


@pytest.fixture(scope="module")
def models(vision_folders: dict[str, Path], llm_folder: Path) -> dict[str, tuple[Path, Callable[[str], object]]]:
    return {
        "encoder": (vision_folders["clip"], lambda model: Encoder(model, precision="float32", device=CPU, batch=1)),
        "language model": (llm_folder, load_language_model),
    }


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("kind", ["encoder", "language model"])
def test_a_hostile_model_is_one_line(
    name: str, kind: str, models: dict[str, tuple[Path, Callable[[str], object]]], tmp_path: Path
) -> None:
    folder, load = models[kind]
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    HOSTILE[name](model)
    with pytest.raises(PipelineError) as caught:
        load(str(model))
    assert str(model) in caught.value.line()
    assert len(caught.value.line()) < 600


TOKENIZERS: dict[str, Change] = {
    "no JSON": holding("tokenizer.json", "{"),
    "a list": holding("tokenizer.json", "[]"),
    "deep": holding("tokenizer.json", "[" * 200_000),
    "another model": holding("tokenizer.json", '{"model": {"type": "Evil"}}'),
    "too large": sparse("tokenizer.json", MAX_VOCABULARY + 1),
    "settings too large": sparse("tokenizer_config.json", MAX_JSON + 1),
    "settings of lists": holding("tokenizer_config.json", "[]"),
    "a directory": in_place_of("tokenizer.json"),
    "not UTF-8": holding("tokenizer.json", b"\xff\xfe{}"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_hostile_tokenizer_is_one_line(name: str, llm_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(llm_folder, tmp_path / "model")
    TOKENIZERS[name](tmp_path / "model")
    with pytest.raises(PipelineError, match=r"^llm\.model: cannot load"):
        read_pretrained(AutoTokenizer, str(tmp_path / "model"), where="llm.model")


@pytest.mark.parametrize("name", ["/no/such/models/clip", "./clip", "../models/clip", "data/models/nowhere", "a/b/c", "~/clip"])
def test_a_missing_folder_is_said_to_be_missing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PipelineError, match=r"^llm\.model: no such folder: .*-> name one, or a hub id"):
        check_model(name, where="llm.model")


def test_a_hub_s_name_is_no_folder_and_a_file_is_none_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("openai/clip-vit-base-patch16", "gpt2"):
        check_model(name, where="vision.model")
    Path("model.gguf").write_bytes(b"GGUF")
    Path("weights").write_bytes(b"")
    for name, said in (("model.gguf", "python -m pipeline.from_gguf"), ("weights", "name the folder it lies in")):
        with pytest.raises(PipelineError, match=f"is a file, expected a folder -> {said}"):
            check_model(str(tmp_path / name), where="llm.model")
