"""MiniMind weights in and out: the equations, the bits, and every file that is refused."""

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
from conftest import HIDDEN, WIDTH, World
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from pipeline import checkpoint
from pipeline.answering import Assistant, Conversation, Sampling
from pipeline.checkpoint import Manifest
from pipeline.minimind.__main__ import app
from pipeline.model import build_projector, load_language_model

VOCABULARY, D, H, LAYERS, TOKENS = 320, 32, 4, 2, 11  # D = 8 heads × H
KINDS = ["2025 dense", "2025 mixture", "2026 dense", "2026 mixture"]
kinds = pytest.mark.parametrize("kind", KINDS)
Tensors = dict[str, torch.Tensor]


def weights(kind: str, *, dtype: torch.dtype = torch.float32, hidden: int = D, shared: int = 1) -> Tensors:
    """Random weights by the names and shapes of MiniMind's released files, everything spread out enough to matter."""
    torch.manual_seed(KINDS.index(kind))
    old, kv, wide = kind.startswith("2025"), 2 if kind.startswith("2025") else 4, 48
    found: Tensors = {"model.embed_tokens.weight": torch.randn(VOCABULARY, hidden) * 0.2}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = torch.randn(rows, columns) * 1.5 / math.sqrt(columns)

    def norm(name: str, size: int) -> None:
        found[f"{name}.weight"] = torch.rand(size) + 0.5

    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        for part, rows in (("q", hidden), ("k", kv * H), ("v", kv * H)):
            linear(f"{layer}.self_attn.{part}_proj", rows, hidden)
        linear(f"{layer}.self_attn.o_proj", hidden, hidden)
        norm(f"{layer}.input_layernorm", hidden)
        norm(f"{layer}.post_attention_layernorm", hidden)
        mlps = [f"{layer}.mlp"]
        if not old:
            norm(f"{layer}.self_attn.q_norm", H)
            norm(f"{layer}.self_attn.k_norm", H)
        if kind.endswith("mixture"):
            linear(f"{layer}.mlp.gate", 4, hidden)
            mlps = [f"{layer}.mlp.experts.{e}" for e in range(4)]
            mlps += [f"{layer}.mlp.shared_experts.{e}" for e in range(shared if old else 0)]
        for mlp in mlps:
            linear(f"{mlp}.gate_proj", wide, hidden)
            linear(f"{mlp}.up_proj", wide, hidden)
            linear(f"{mlp}.down_proj", hidden, wide)
    norm("model.norm", hidden)
    found["lm_head.weight"] = found["model.embed_tokens.weight"]
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def reference(w: Tensors, ids: torch.Tensor, *, eps: float, theta: float = 1e6, chosen: int = 1) -> torch.Tensor:
    """Logits [T, V] of MiniMind's equations in float64: pre-norm decoder, rotary halves, grouped queries, SwiGLU, experts."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps)

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Rotate the pair (x[i], x[i + H/2]) at position t by the angle t × theta^(-2i/H); x is [heads, T, H]."""
        angle = torch.arange(x.shape[1]).double()[:, None] * theta ** (-torch.arange(0, H, 2).double() / H)
        first, second = x[..., : H // 2], x[..., H // 2 :]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def attend(x: torch.Tensor, p: str) -> torch.Tensor:
        q, k, v = ((x @ w[f"{p}.{part}_proj.weight"].T).unflatten(-1, (-1, H)).transpose(0, 1) for part in "qkv")
        if f"{p}.q_norm.weight" in w:
            q, k = rms(q, w[f"{p}.q_norm.weight"]), rms(k, w[f"{p}.k_norm.weight"])
        q, k = turn(q), turn(k)
        group = len(q) // len(k)
        heads = []
        for head, query in enumerate(q):
            scores = query @ k[head // group].T / math.sqrt(H)
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v[head // group])
        return torch.cat(heads, -1) @ w[f"{p}.o_proj.weight"].T

    def swiglu(x: torch.Tensor, p: str) -> torch.Tensor:
        gate, up = x @ w[f"{p}.gate_proj.weight"].T, x @ w[f"{p}.up_proj.weight"].T
        return (gate / (1 + torch.exp(-gate)) * up) @ w[f"{p}.down_proj.weight"].T

    def feed(x: torch.Tensor, p: str) -> torch.Tensor:
        if f"{p}.gate.weight" not in w:
            return swiglu(x, p)
        outputs = []
        for token in x:
            scores, best = (token @ w[f"{p}.gate.weight"].T).softmax(-1).topk(chosen)
            parts = [s / scores.sum() * swiglu(token, f"{p}.experts.{int(e)}") for s, e in zip(scores, best, strict=True)]
            shared = {name.split(".")[5] for name in w if name.startswith(f"{p}.shared_experts.")}
            outputs.append(sum(parts + [swiglu(token, f"{p}.shared_experts.{e}") for e in shared]))
        return torch.stack(outputs)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(LAYERS):
        p = f"model.layers.{i}"
        x = x + attend(rms(x, w[f"{p}.input_layernorm.weight"]), f"{p}.self_attn")
        x = x + feed(rms(x, w[f"{p}.post_attention_layernorm.weight"]), f"{p}.mlp")
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def defaults(kind: str) -> dict[str, Any]:
    return {"eps": 1e-5, "chosen": 2} if kind.startswith("2025") else {"eps": 1e-6, "chosen": 1}


def projection(kind: str, hidden: int = D) -> Tensors:
    """MiniMind-V's projector of each generation."""
    torch.manual_seed(7)
    if kind == "linear":
        shapes: dict[str, tuple[int, ...]] = {"vision_proj.0.weight": (hidden, WIDTH), "vision_proj.0.bias": (hidden,)}
    else:
        shift = int(kind == "norm_mlp")
        shapes = {"mlp.0.weight": (WIDTH,), "mlp.0.bias": (WIDTH,)} if shift else {}
        shapes |= {f"mlp.{shift}.weight": (hidden, WIDTH), f"mlp.{shift}.bias": (hidden,)}
        shapes |= {f"mlp.{shift + 2}.weight": (hidden, hidden), f"mlp.{shift + 2}.bias": (hidden,)}
    return {f"vision_proj.{name}": torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "llm_32.pth"


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_language_model(str(folder)).eval()(ids[None]).logits[0]


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
        "chat_template.jinja",
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
    text = (Path(__file__).parent.parent / "params.yaml").read_text()
    text = text.replace("data/models/clip", world.clip.name).replace("precision: auto", "precision: float32", 1)
    (tmp_path / "params.yaml").write_text(text)
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
    from pipeline.params import load
    from pipeline.parts import make_encoder, make_model

    source = trained(world, project / "sft", "mlp")
    done("export", source, "x.pth")
    done("import", "x.pth", "out", "--heads", 2, "--tokenizer", source, "--checkpoint", "--image-token", "<image>")
    params: Any = load()
    model = make_model(params, params.sft, make_encoder(params, torch.device("cpu")), "float32", Path("out"))
    assert model.hidden_size == HIDDEN


def test_an_export_names_what_minimind_must_be_told(world: World, tmp_path: Path) -> None:
    said = done("export", trained(world, tmp_path / "sft", "norm_mlp"), tmp_path / "x.pth")
    assert "MiniMindConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, " in said
    assert "no release of MiniMind-V has" in said


class Code:
    """Runs a command when unpickled by a reader that allows it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


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
    "a broken tokenizer": (["out", "--tokenizer", "broken"], "broken: cannot be loaded"),
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
