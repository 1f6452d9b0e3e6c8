"""Weights as MiniMind publishes them, its equations written out, and its two commands."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WIDTH, World
from typer.testing import CliRunner, Result

from pipeline.minimind.__main__ import app
from pipeline.vlm.model.language_model import load_language_model

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


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return load_language_model(str(folder)).eval()(ids[None]).logits[0]


def write_params(world: World, folder: Path) -> None:
    """The project's params.yaml with the small CLIP in it."""
    text = (Path(__file__).parent.parent / "params.yaml").read_text()
    text = text.replace("data/models/clip", world.clip.name).replace("precision: auto", "precision: float32", 1)
    (folder / "params.yaml").write_text(text)
