"""A project's folder around the tests' tiny models, in which the stages run as they are, in this process."""

import csv
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conftest import World, row

from pipeline.params.reading import check, override, read_yaml
from pipeline.params.schema import Params
from pipeline.params.stage_view import StageParams
from pipeline.text.token_table import TokenTable
from stages import extract, pretrain, sft, tokenize

ROOT = Path(__file__).parent.parent
MAIN = {"extract": extract.main, "tokenize": tokenize.main, "pretrain": pretrain.main, "sft": sft.main}
TINY = [
    "llm.model=data/models/llm", "vision.model=data/models/clip", "vision.precision=float32", "vision.shard_rows=4",
    "runtime.device=cpu", "runtime.workers=0", "runtime.extract_batch=4", "pretrain.precision=float32",
    "sft.precision=float32", "pretrain.epochs=1", "pretrain.batch_size=4", "sft.batch_size=4", "evaluate.max_new_tokens=2",
]  # fmt: skip


def with_path(*folders: Path) -> str:
    """PYTHONPATH with these folders first: what was there may hold packages that this machine needs."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


class Project:
    """The folder the test runs in: data/mine/{pretrain,sft,heldout}.jsonl over data/mine/pictures."""

    def __init__(self, world: World, folder: Path) -> None:
        self.folder, self.pictures = folder, folder / "data/mine/pictures"
        (folder / "data/models").mkdir(parents=True)
        (folder / "data/models/clip").symlink_to(world.clip.name)
        (folder / "data/models/llm").symlink_to(world.llm)
        self.pictures.mkdir(parents=True)
        self.content = read_yaml(ROOT / "params.yaml")
        for name in ("pretrain", "sft", "heldout"):
            self.content["data"][name] |= {"records": f"data/mine/{name}.jsonl", "images": "data/mine/pictures"}
        override(self.content, TINY)

    def set(self, *assignments: str) -> None:
        override(self.content, list(assignments))

    def write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        path = self.folder / "data/mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def write_pictures(self, png: Callable[[int], bytes], rows: Sequence[dict[str, Any]]) -> None:
        """Eight pictures, `rows` to train on in both stages, and two held-out ones."""
        for number in range(8):
            (self.pictures / f"{number}.png").write_bytes(png(number))
        for name in ("pretrain", "sft"):
            self.write(f"{name}.jsonl", rows)
        self.write("heldout.jsonl", [row("<image>\nWhat is this?", "A circle.", f"{number}.png") for number in (6, 7)])

    @property
    def params(self) -> Params:
        return check(self.content, where="params.yaml")

    def run(self, *stages: str) -> dict[str, Any]:
        """The figures of the last of `stages`, each with the params that dvc.yaml lists for it."""
        figures: dict[str, Any] = {}
        for name in stages:
            figures = MAIN[name](self.stage_params(name))
        return figures

    def stage_params(self, name: str, *assignments: str) -> StageParams:
        """What a stage sees of the params, after these changes."""
        self.set(*assignments)
        listed = read_yaml(ROOT / "dvc.yaml")["stages"][name]["params"]
        return StageParams(self.params, frozenset(listed) | {"runtime"}, name)

    def table(self, name: str) -> TokenTable:
        return TokenTable(self.folder / f"data/tokens/{name}.arrow")

    def listed(self, file: str) -> list[dict[str, str]]:
        """The rows of a table of what was rejected."""
        with (self.folder / "data" / file).open(encoding="utf-8", newline="") as text:
            return list(csv.DictReader(text))

    def outputs(self) -> dict[str, bytes]:
        """Every byte that the stages wrote under data."""
        found = [path for name in ("features", "features_meta", "tokens") for path in (self.folder / "data" / name).glob("*")]
        found += (self.folder / "data").glob("features_*.csv")
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in found}
