"""MiniMind weights in and out: the equations and the bits."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, WIDTH, World
from minimind_files import (
    TOKENS,
    VOCABULARY,
    D,
    Tensors,
    defaults,
    done,
    kinds,
    logits,
    projection,
    reference,
    run,
    weights,
    write_params,
)
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pipeline.chat.assistant import Assistant, Conversation, Sampling
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.projector import build_projector


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llm_32.pth"


IDS = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(0))


@kinds
def test_an_imported_model_gives_the_logits_of_the_published_equations(file: Path, tmp_path: Path, kind: str) -> None:
    w = weights(kind)
    torch.save(w, file)
    done("import", file, tmp_path / "out")
    found, expected = logits(tmp_path / "out", IDS), reference(w, IDS, **defaults(kind))
    assert expected.std() > 0.3
    assert (found - expected).abs().max() < 1e-5


def test_two_shared_experts_are_one_that_is_twice_as_wide(file: Path, tmp_path: Path) -> None:
    w = weights("2025 mixture", shared=2)
    torch.save(w, file)
    done("import", file, tmp_path / "out")
    expected = reference(w, IDS, **defaults("2025 mixture"))
    assert (logits(tmp_path / "out", IDS) - expected).abs().max() < 1e-5
    done("export", tmp_path / "out", tmp_path / "back.pth", "--dtype", "float32")
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True), w)


@pytest.mark.parametrize(
    ("option", "value", "changed"),
    [("--eps", 1e-2, {"eps": 1e-2}), ("--rope-theta", 1e4, {"theta": 1e4}), ("--experts-per-token", 3, {"chosen": 3})],
)
def test_what_a_file_does_not_say_can_be_given(
    file: Path, tmp_path: Path, option: str, value: float, changed: dict[str, float]
) -> None:
    w = weights("2026 mixture")
    torch.save(w, file)
    done("import", file, tmp_path / "out", option, value)
    found, usual = logits(tmp_path / "out", IDS), defaults("2026 mixture")
    expected = reference(w, IDS, **(usual | changed))
    assert (found - expected).abs().max() < 1e-5
    assert (found - reference(w, IDS, **usual)).abs().max() > 1e-3, "or the option would do nothing"


def assert_equal(one: Tensors, other: Tensors) -> None:
    assert set(one) == set(other)
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in other)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_export_of_an_import_is_the_file_bit_for_bit(file: Path, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    w = weights(kind, dtype=dtype)
    torch.save(w, file)
    done("import", file, tmp_path / "out")
    done("export", tmp_path / "out", tmp_path / "back.pth", "--dtype", str(dtype)[6:])
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True), w)
    done("import", tmp_path / "back.pth", tmp_path / "again")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_two_exports_have_the_same_bytes_and_hold_a_tied_table_once(file: Path, tmp_path: Path) -> None:
    torch.save(weights("2026 dense"), file)
    done("import", file, tmp_path / "out")
    done("export", tmp_path / "out", tmp_path / "one.pth")
    done("export", tmp_path / "out", tmp_path / "another.pth")
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another.pth").read_bytes()
    found = torch.load(tmp_path / "one.pth", weights_only=True)
    assert found["lm_head.weight"].data_ptr() == found["model.embed_tokens.weight"].data_ptr()


def test_an_imported_folder_is_any_transformers_model(file: Path, tmp_path: Path, tokenizer_folders: dict[str, Path]) -> None:
    torch.save(weights("2025 dense", dtype=torch.float16), file)
    out = done("import", file, tmp_path / "out", "--tokenizer", tokenizer_folders["embedded"], "--image-token", "<image>")
    assert "still needed" not in out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "checksums.json",
    }  # fmt: skip


def test_without_a_tokenizer_the_last_line_says_what_is_needed(file: Path, tmp_path: Path) -> None:
    torch.save(weights("2025 dense"), file)
    assert done("import", file, tmp_path / "out").splitlines()[-1] == (
        f"still needed: a tokenizer with a chat template in {tmp_path / 'out'} -> --tokenizer FOLDER"
    )


def test_a_projection_that_differs_from_the_table_is_kept_apart(file: Path, tmp_path: Path) -> None:
    w = weights("2026 dense")
    w["lm_head.weight"] = w["lm_head.weight"].flip(0)
    torch.save(w, file)
    assert "differs from its embedding table" in done("import", file, tmp_path / "out")
    expected = reference(w, IDS, eps=1e-6)
    assert (logits(tmp_path / "out", IDS) - expected).abs().max() < 1e-5
    assert "tie_word_embeddings=False" in done("export", tmp_path / "out", tmp_path / "back.pth", "--dtype", "float32")
    assert_equal(torch.load(tmp_path / "back.pth", weights_only=True), w)


@pytest.mark.parametrize("kind", ["linear", "mlp", "norm_mlp"])
def test_a_projector_comes_along_and_computes_what_minimind_v_does(file: Path, tmp_path: Path, kind: str) -> None:
    w = projection(kind)
    torch.save(weights("2026 dense") | w, file)
    assert f"projector: {kind}, for patch features of width {WIDTH}" in done("import", file, tmp_path / "out")
    projector = build_projector(kind, WIDTH, D)
    checkpoint.load_projector(projector, tmp_path / "out")
    x = y = torch.randn(5, WIDTH)
    if kind == "linear":
        y = F.linear(x, w["vision_proj.vision_proj.0.weight"], w["vision_proj.vision_proj.0.bias"])
    else:
        layers = sorted({int(name.split(".")[2]) for name in w})
        if kind == "norm_mlp":
            y = F.layer_norm(x, (WIDTH,), w["vision_proj.mlp.0.weight"], w["vision_proj.mlp.0.bias"])
        for i in layers[-2:]:
            y = F.linear(y, w[f"vision_proj.mlp.{i}.weight"], w[f"vision_proj.mlp.{i}.bias"])
            y = F.gelu(y) if i != layers[-1] else y
    with torch.inference_mode():
        difference = (projector(x) - y).abs().max() / y.abs().max()
    assert difference < (2e-3 if kind == "mlp" else 1e-6), "mlp has GELU's tanh form here, the exact one in MiniMind-V"


def test_the_vision_tower_in_a_file_is_left_out_and_said_so(file: Path, tmp_path: Path) -> None:
    tower = {"vision_encoder.vision_model.embeddings.class_embedding": torch.randn(8), "vision_encoder.logit_scale": torch.ones(())}
    state = weights("2025 dense") | tower | projection("linear")
    torch.save({"model": state, "optimizer": {"state": {}, "param_groups": []}, "epoch": 1, "wandb_id": None}, file)
    out = done("import", file, tmp_path / "out")
    assert "left out: the vision tower, 2 tensors vision_encoder.* (9 parameters)" in out
    names = set(load_file(tmp_path / "out" / "model.safetensors")) | set(load_file(tmp_path / "out" / "projector.safetensors"))
    assert not any("vision" in name for name in names)


@pytest.fixture
def project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a params.yaml that names the small CLIP; the test runs in it."""
    write_params(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(world: World, folder: Path, kind: str) -> Path:
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "auto", "spec": world.clip.spec()}
    llm = {"model": str(world.llm), "revision": "", "image_token": "<image>"}
    manifest = Manifest(vision, llm, {"kind": kind, "width": WIDTH, "hidden": HIDDEN}, own_llm=True)
    checkpoint.save(folder, world.model("all", kind=kind), manifest, world.builder)
    return folder


@pytest.mark.parametrize("kind", ["linear", "mlp", "norm_mlp"])
def test_a_trained_model_comes_back_as_the_same_model(world: World, project: Path, kind: str) -> None:
    source = trained(world, project / "sft", kind)
    said = done("export", source, "sft_vlm_32.pth", "--dtype", "float32")
    options = re.search(r"OUT (.*)--tokenizer", said)[1].split()  # type: ignore[index]
    done("import", "sft_vlm_32.pth", "out", *options, "--tokenizer", source, "--checkpoint", "--image-token", "<image>")
    (one, before), (other, after) = checkpoint.load(source), checkpoint.load("out")
    assert_equal(one.state_dict(), other.state_dict())
    assert (after.projector, after.own_llm) == (before.projector, True)
    picture, answers = world.folder / "images/0.png", []
    for folder in (source, project / "out"):
        assistant, talk = Assistant(folder, device="cpu"), Conversation()
        assistant.ask(talk, "What is this?", assistant.look(picture))
        answers.append("".join(assistant.answer(talk, Sampling(max_new_tokens=8))))
    assert answers[0] == answers[1]


def test_a_checkpoint_is_one_that_sft_starts_from(world: World, project: Path) -> None:
    from pipeline.features import load_encoder
    from pipeline.params.reading import load
    from pipeline.vlm.training.parts import make_model

    source = trained(world, project / "sft", "mlp")
    done("export", source, "x.pth")
    done("import", "x.pth", "out", "--heads", 2, "--tokenizer", source, "--checkpoint", "--image-token", "<image>")
    params: Any = load()
    model = make_model(params, params.sft, load_encoder(params.vision, device=torch.device("cpu"), batch=1), "float32", Path("out"))
    assert model.hidden_size == HIDDEN


def test_a_projector_that_minimind_never_had_is_refused(world: World, tmp_path: Path) -> None:
    ended = run("export", trained(world, tmp_path / "sft", "mlp3x"), tmp_path / "x.pth")
    assert ended.exit_code == 2
    said = " ".join(ended.stderr.split())
    assert "projector.kind: MiniMind-V has no projector of kind mlp3x -> train with projector.kind: linear" in said
    assert not (tmp_path / "x.pth").exists()


def test_an_export_names_what_minimind_must_be_told(world: World, tmp_path: Path) -> None:
    said = done("export", trained(world, tmp_path / "sft", "norm_mlp"), tmp_path / "x.pth")
    assert "MiniMindConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, " in said
    assert "no release of MiniMind-V has" in said
