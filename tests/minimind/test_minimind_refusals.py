"""Every MiniMind file, model and command line that is refused: one line, and nothing is written."""

import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, World
from minimind_files import D, Tensors, done, projection, run, weights, write_params
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import Result

from pipeline.vlm.model.language_model import load_language_model


class Code:
    """Runs a command when unpickled by a reader that allows it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a params.yaml that names the small CLIP; the test runs in it."""
    write_params(world, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llm_32.pth"


def saved(change: Callable[[Tensors], object], kind: str = "2025 dense") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        w: Any = weights(kind) | projection("linear")
        torch.save(change(w) or w, path)

    return write


def cut(path: Path) -> None:
    saved(dict)(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    saved(dict)(path)
    data = bytearray(path.read_bytes())
    data[data.index(weights("2025 dense")[Q].numpy().tobytes())] ^= 1
    path.write_bytes(data)
    changed = torch.load(path, weights_only=True)[Q] != weights("2025 dense")[Q]
    assert changed.sum() == 1, "PyTorch reads it without a word"


def zip_of_something_else(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"hello")
        archive.writestr("archive/version", b"3")


OLD_NAMES = ["tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight", "output.weight"]

Q, GATE, LINEAR = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight", "vision_proj.vision_proj.0"

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (Path.exists, "no such file"),
    "a folder": (Path.mkdir, "no such file"),
    "an empty file": (lambda path: path.write_bytes(b""), "not a PyTorch weight file: it is empty"),
    "a page of text": (lambda path: path.write_bytes(b"<html>404</html>" * 99), "not a PyTorch weight file: it begins with"),
    "an old pickle": (lambda path: torch.save({}, path, _use_new_zipfile_serialization=False), "not a PyTorch weight file"),
    "a cut file": (cut, r"cut off or damaged at [\d,]+ bytes -> copy it again"),
    "a flipped bit": (flip, "damaged: .* fails its checksum"),
    "another zip": (zip_of_something_else, "not a weight file: its pickle cannot be read"),
    "code": (lambda path: torch.save({"a": Code(path.with_name("ran"))}, path), r"holds more than tensors \(posix.mkdir\)"),
    "a whole module": (lambda path: torch.save(torch.nn.Linear(1, 1), path), r"holds more than tensors \(torch.nn"),
    "a list": (lambda path: torch.save([torch.ones(2)], path), "expected a dictionary of tensors, got a list"),
    "an empty dictionary": (lambda path: torch.save({}, path), "expected a dictionary of tensors, got nothing"),
    "a number": (saved(lambda w: w.update(step=3)), "expected tensors only, but 'step' is a int"),
    "integers": (saved(lambda w: w.update({Q: torch.ones(D, D, dtype=torch.int8)})), rf"{Q} is torch.int8, expected one of"),
    "not a number": (saved(lambda w: w[Q][0, :1].fill_(math.nan).tolist().clear()), rf"{Q} is not finite"),
    "names before 2025": (saved(lambda _: dict.fromkeys(OLD_NAMES, torch.ones(2, 2))), "of MiniMind before 27 April 2025"),
    "no language model": (saved(lambda _: projection("linear")), "holds no model.embed_tokens.weight"),
    "an adapter only": (saved(lambda w: {f"{Q[:-7]}.lora.A.weight": w[Q]}), "holds no model.embed_tokens.weight"),
    "an unknown tensor": (saved(lambda w: w.update(extra=w[Q])), "unknown tensor extra"),
    "a bias": (saved(lambda w: w.update({f"{Q[:-7]}.bias": torch.ones(D)})), "unknown tensor model.layers.1.self_attn.q_proj.bias"),
    "a missing tensor": (saved(lambda w: w.pop(Q) is None), rf"missing tensor {Q}"),
    "a missing layer": (saved(lambda w: {n.replace("layers.0", "layers.2"): t for n, t in w.items()}), "holds no model.layers.0"),
    "a layer skipped": (saved(lambda w: {n.replace("layers.1", "layers.2"): t for n, t in w.items()}), "layer 1 of 3 is missing"),
    "a wrong shape": (saved(lambda w: w.update({Q: w[Q][:-4]})), rf"misshapen tensor {Q}, \[28, 32\] where \[32, 32\] is expected"),
    "a flat table": (saved(lambda w: w.update({"model.embed_tokens.weight": torch.ones(9)})), r"the impossible shape \[9\]"),
    "other heads": (
        saved(lambda w: {n: t[:4] if "k_proj" in n or "v_proj" in n else t for n, t in w.items()}),
        "are not MiniMind's 8 heads and 2 key/value heads -> set --heads",
    ),
    "half an expert": (saved(lambda w: w.pop(EXPERT) is None, "2026 mixture"), f"missing tensor {EXPERT}"),
    "half a projector": (saved(lambda w: w.pop(f"{LINEAR}.bias") is None), rf"missing tensor {LINEAR}.bias in a linear projector"),
    "a projector too many": (saved(lambda w: w | projection("mlp")), "unknown tensor vision_proj.mlp.0.weight in a linear"),
    "another projector": (saved(lambda w: weights("2025 dense") | {"vision_proj.q": w[Q]}), "holds no vision_proj.mlp.0.weight"),
    "a scalar projector": (saved(lambda w: w.update({f"{LINEAR}.weight": torch.ones(())})), rf"{LINEAR}.weight is \[\] where"),
    "a projector of another width": (saved(lambda w: w | projection("linear", 16)), rf"{LINEAR}.weight is \[16, 32\] where"),
}  # fmt: skip


def refused(result: Result, message: str) -> None:
    assert result.exit_code not in (0, 1), result.output
    assert len(result.stderr.splitlines()) == 1
    assert re.match(rf"error: .*{message}", result.stderr), result.stderr
    assert not result.stdout


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_minimind_is_refused_in_one_line_and_nothing_is_written(file: Path, tmp_path: Path, case: str) -> None:
    write, message = REFUSED[case]
    write(file)
    refused(run("import", file, tmp_path / "out"), message)
    assert [path.name for path in tmp_path.iterdir() if path != file] == []


MISTAKES: dict[str, tuple[list[str], str]] = {
    "the folder is there already": (["."], r"\.: is there already -> choose another place"),
    "the folder would lie in a file": (["x.pth/out"], "x.pth/out: cannot be written"),
    "the folder's name is too long": (["o" * 300], "cannot be written: File name too long"),
    "heads that do not fit": (["out", "--heads", "5"], "5 heads do not fit"),
    "experts of a dense model": (["out", "--experts-per-token", "2"], "the file has 0 experts"),
    "no tokenizer there": (["out", "--tokenizer", "nowhere"], "nowhere: holds no tokenizer.json"),
    "a checkpoint without a tokenizer": (["out", "--checkpoint"], "--checkpoint needs a tokenizer -> add --tokenizer"),
    "an image token it has not": (
        ["out", "--tokenizer", "tokenizer", "--image-token", "<x>"],
        "tokenizer: '<x>' is not a token of it",
    ),
    "a broken tokenizer": (["out", "--tokenizer", "broken"], "--tokenizer: cannot load .*broken"),
    "a tokenizer without a chat template": (["out", "--tokenizer", "plain"], "plain: has not a chat template"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("project")
def test_a_mistake_on_the_command_line_is_one_line(tokenizer_folders: dict[str, Path], mistake: str) -> None:
    torch.save(weights("2025 dense") | projection("linear"), "x.pth")
    for name in ("tokenizer", "plain", "broken"):
        shutil.copytree(tokenizer_folders["embedded"], name)
    Path("plain/chat_template.jinja").unlink()
    Path("broken/tokenizer.json").write_text('{"version": "1.0"')
    arguments, message = MISTAKES[mistake]
    refused(run("import", "x.pth", *arguments), message)
    assert not Path("out").exists()


@pytest.mark.usefixtures("project")
def test_a_tokenizer_with_more_tokens_than_the_table_is_refused(tokenizer_folders: dict[str, Path]) -> None:
    w = weights("2025 dense")
    w["model.embed_tokens.weight"] = w["lm_head.weight"] = w["lm_head.weight"][:300]
    torch.save(w, "x.pth")
    result = run("import", "x.pth", "out", "--tokenizer", tokenizer_folders["embedded"], "--image-token", "<image>")
    refused(result, "its 320 tokens are more than the 300 of the weights")


@pytest.mark.usefixtures("project")
def test_a_projector_for_another_encoder_is_refused(tokenizer_folders: dict[str, Path]) -> None:
    wide = {"vision_proj.vision_proj.0.weight": torch.ones(D, 4 * WIDTH), "vision_proj.vision_proj.0.bias": torch.ones(D)}
    torch.save(weights("2025 dense") | wide, "x.pth")
    tokenizer = ["--tokenizer", tokenizer_folders["embedded"], "--image-token", "<image>"]
    refused(run("import", "x.pth", "out", "--checkpoint", *tokenizer), "takes features of width 128, .* gives 32")


def test_a_shared_expert_whose_gate_has_trained_is_not_exported(file: Path, tmp_path: Path) -> None:
    torch.save(weights("2025 mixture"), file)
    done("import", file, tmp_path / "out")
    model = load_language_model(str(tmp_path / "out"))
    model.get_decoder().layers[1].mlp.shared_expert_gate.weight.data += 1e-3
    model.save_pretrained(tmp_path / "out")
    refused(run("export", tmp_path / "out", tmp_path / "x.pth"), r".*model\.safetensors: .* delete its checksums\.json")
    (tmp_path / "out/checksums.json").unlink()
    refused(run("export", tmp_path / "out", tmp_path / "x.pth"), r"model.layers.1.mlp.shared_expert_gate.weight has trained")


def llama(folder: Path, **changes: Any) -> Path:
    config = {"vocab_size": 9, "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(**(config | {"tie_word_embeddings": True} | changes))).save_pretrained(folder)
    return folder


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "untied": ({"tie_word_embeddings": False}, "tied embeddings"),
    "wide heads": ({"head_dim": 8}, "heads × head_dim = hidden_size"),
    "biases": ({"attention_bias": True}, "attention_bias is True, MiniMind's is False"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu', MiniMind's is 'silu'"),
    "scaled positions": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type is linear"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_minimind_cannot_compute_is_not_exported(tmp_path: Path, case: str) -> None:
    changes, message = UNFIT[case]
    refused(run("export", llama(tmp_path / "m", **changes), tmp_path / "x.pth"), message)
    assert not (tmp_path / "x.pth").exists()


def test_other_families_missing_folders_and_files_in_the_way_are_refused(tmp_path: Path, vision_folders: dict[str, Path]) -> None:
    refused(run("export", vision_folders["clip"], tmp_path / "x.pth"), "cannot load|has no MiniMind layout")
    refused(run("export", tmp_path / "none", tmp_path / "x.pth"), "no such folder")
    refused(run("export", tmp_path, tmp_path / "x.pth"), "holds neither glance.json nor config.json")
    refused(run("export", llama(tmp_path / "m"), tmp_path / "m/config.json/x.pth"), "cannot be written")
    (tmp_path / "x.pth").write_bytes(b"mine")
    refused(run("export", tmp_path / "m", tmp_path / "x.pth"), "is there already")
    assert (tmp_path / "x.pth").read_bytes() == b"mine"


def test_values_that_float16_cannot_hold_are_refused(file: Path, tmp_path: Path) -> None:
    w = weights("2025 dense")
    w[GATE][0, 0] = 1e5
    torch.save(w, file)
    done("import", file, tmp_path / "out")
    refused(run("export", tmp_path / "out", tmp_path / "x.pth"), rf"{GATE} is not finite -> --dtype float32")
    done("export", tmp_path / "out", tmp_path / "x.pth", "--dtype", "bfloat16")
