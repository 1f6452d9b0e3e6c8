"""Mixtures of experts through both training stages: their router's own loss counts where the router trains, and nowhere else."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN, ROWS, World, train_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from pipeline.core.checksums import sign
from pipeline.params.reading import check, override, read_yaml
from pipeline.params.stage_view import StageParams
from stages import pretrain, sft

ROOT = Path(__file__).parents[3]
SHAPE = {
    "vocab_size": 320, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, num_experts=4, moe_intermediate_size=32, head_dim=16),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
}


@pytest.fixture(autouse=True)
def _project(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs in a folder in which the training stages can run on the small world."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/tokens").mkdir(parents=True)
    (tmp_path / "data/features").symlink_to(world.folder / "features")
    table = world.tokens(ROWS, "mixtures")
    for name in ("pretrain", "sft", "heldout"):
        shutil.copy(table.path, tmp_path / "data/tokens" / f"{name}.arrow")
    sign(tmp_path / "data/tokens")


def mixture(family: str, coefficient: float) -> Path:
    """The same random mixture each time, whose config weighs the router's loss by `coefficient`."""
    folder = Path(f"{family}-{coefficient}")
    torch.manual_seed(2)
    config = FAMILIES[family]
    config.router_aux_loss_coef = coefficient
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    train_tokenizer("embedded").save_pretrained(folder)
    return folder


def run(world: World, llm: Path, train: str) -> tuple[list[dict[str, str]], list[dict[str, str]], dict[str, torch.Tensor]]:
    """Both stages; returns their histories and the language model that sft has written."""
    content = read_yaml(ROOT / "params.yaml")
    for part in ("pretrain", "sft", "heldout"):
        content["data"][part] |= {"records": str(world.folder / "mixtures.jsonl"), "images": str(world.images.path)}
    given = [
        f"vision.model={world.clip.name}", "vision.precision=float32", f"llm.model={llm}", f"sft.train={train}",
        "runtime.device=cpu", "runtime.extract_batch=4", "runtime.workers=0", "evaluate.max_new_tokens=1",
        "evaluate.limit=2",
        *(f"{stage}.{key}" for stage in ("pretrain", "sft") for key in ("precision=float32", "batch_size=6", "epochs=1")),
    ]  # fmt: skip
    override(content, given)
    names = frozenset(["llm", "projector", "pretrain", "sft", "vision", "evaluate", "data", "runtime"])
    params = check(content, where="params.yaml")
    pretrain.main(StageParams(params, names, "pretrain"))
    sft.main(StageParams(params, names, "sft"))
    own = Path("models/sft/model.safetensors")
    return history("pretrain"), history("sft"), load_file(own) if own.is_file() else {}


def history(stage: str) -> list[dict[str, str]]:
    with Path(f"results/{stage}/history.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def gates(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {name: tensor for name, tensor in tensors.items() if name.endswith(".gate.weight")}
    assert len(found) == SHAPE["num_hidden_layers"]
    return found


@pytest.mark.parametrize(("family", "train"), [("qwen3_moe", "all"), ("mixtral", "all"), ("mixtral", "projector+ends")])
def test_the_router_loss_counts_where_the_router_trains_and_not_in_pretrain(world: World, family: str, train: str) -> None:
    without, heavy = (run(world, mixture(family, coefficient), train) for coefficient in (0.0, 0.5))
    assert without[0] == heavy[0], "with the router frozen its loss is no part of anything"
    assert not Path("models/pretrain/model.safetensors").exists()
    assert [row["grad_norm"] for row in heavy[1]] != [row["grad_norm"] for row in without[1]]
    assert json.loads(Path("models/sft/config.json").read_text())["model_type"] == family
    assert all(float(row["router_loss"]) > 0.1 for row in heavy[1]), "weighed by 0.5, and at least 1 for an even mixture"
    assert {float(row["router_loss"]) for row in without[1]} == {0.0}
    assert "router_loss" not in heavy[0][0]
    before = gates(load_file(mixture(family, 0.5) / "model.safetensors"))
    trained, balanced = gates(without[2]), gates(heavy[2])
    layers = [0, 1, 2] if train == "all" else [0, 2]
    for name, gate in before.items():
        trains = int(name.split(".")[2]) in layers
        assert torch.equal(balanced[name], gate) != trains
        assert torch.equal(balanced[name], trained[name]) != trains


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixture_whose_router_stays_frozen_trains_alike_whatever_its_router_loss_weighs(world: World, family: str) -> None:
    without, heavy = (run(world, mixture(family, coefficient), "projector") for coefficient in (0.0, 0.5))
    assert without[:2] == heavy[:2]
