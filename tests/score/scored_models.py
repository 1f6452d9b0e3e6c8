"""A project's folder with trained checkpoints of the tests' tiny models, in which the command runs as it is."""

import shutil
from pathlib import Path

import torch
from conftest import HIDDEN, WIDTH, World
from projects import ROOT, TINY
from ruamel.yaml import YAML

from pipeline.params.reading import override, read_yaml
from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.checkpoint import Manifest


def make_project(world: World, folder: Path, *assignments: str) -> None:
    """params.yaml, dvc.yaml and score/ as they come, for the tiny models."""
    content = read_yaml(ROOT / "params.yaml")
    override(content, [*TINY, f"vision.model={world.clip.name}", f"llm.model={world.llm}", "runtime.eval_batch=64", *assignments])
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(content, file)
    (folder / "dvc.yaml").write_text("stages: {}\n")
    shutil.copytree(ROOT / "score", folder / "score", ignore=shutil.ignore_patterns("dvc.lock", ".gitignore"))


def save_model(world: World, folder: Path, *, seed: int) -> Path:
    """A checkpoint whose projector follows from `seed`."""
    vision = {"model": world.clip.name, "revision": "", "layer": -1, "precision": "auto", "spec": world.clip.spec()}
    llm = {"model": str(world.llm), "revision": "", "image_token": "<image>"}
    model = world.model("all")
    torch.manual_seed(seed)
    for weights in model.projector.parameters():
        torch.nn.init.normal_(weights, std=0.5)
    manifest = Manifest(vision, llm, {"kind": "mlp", "width": WIDTH, "hidden": HIDDEN}, own_llm=True)
    checkpoint.save(folder, model, manifest, world.builder)
    return folder
