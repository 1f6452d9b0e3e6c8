"""One flipped bit or a lost end in any artefact is noticed when it is opened, and the file is named. Shards: tests/features."""

import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from conftest import ROWS, World
from flips import unnoticed
from test_checkpoint import manifest_of

from pipeline.core.errors import ARTEFACT, PipelineError
from pipeline.core.files import publish_folder
from pipeline.export.marker import read_marker, write_marker
from pipeline.text.token_table import TokenTable
from pipeline.vlm.model import checkpoint
from pipeline.vlm.training.state import TrainingState
from stages.tokenize import _read_meta

Opened = Callable[[Path], object]


def tokens(world: World, folder: Path) -> tuple[Path, Opened]:
    table = world.tokens(ROWS, "flips").path
    with publish_folder(folder / "tokens") as made:
        (made / "pretrain.arrow").write_bytes(table.read_bytes())
        (made / "refused.jsonl").write_text('{"where": "a:1"}\n')
    return folder / "tokens", lambda opened: TokenTable(opened / "pretrain.arrow")


def meta(_: World, folder: Path) -> tuple[Path, Opened]:
    with publish_folder(folder / "features_meta") as made:
        (made / "encoder.json").write_text('{"tokens": 64, "width": 128}\n')
        (made / "images.npy").write_bytes(bytes(range(200)))
    return folder / "features_meta", lambda opened: _read_meta(opened / "encoder.json")


def model(own_llm: bool) -> Callable[[World, Path], tuple[Path, Opened]]:
    def made(world: World, folder: Path) -> tuple[Path, Opened]:
        checkpoint.save(folder / "m", world.model(), manifest_of(world, own_llm=own_llm), world.builder)
        return folder / "m", checkpoint.load

    return made


def export(world: World, folder: Path) -> tuple[Path, Opened]:
    with publish_folder(folder / "out") as made:
        write_marker(made, manifest_of(world, own_llm=True), dtype="float32")
        (made / "model.safetensors").write_bytes(bytes(range(256)) * 16)
    return folder / "out", read_marker


def state(world: World, folder: Path) -> tuple[Path, Opened]:
    trained = world.model("projector")
    optimizer = torch.optim.AdamW(trained.projector.parameters())
    states = TrainingState(folder, "t", {"k": 1})
    states.save(trained, optimizer, [{"step": 0, "loss": 1.0}], None)

    def opened(found: Path) -> None:
        """Passed over aloud is as good as refused: the line is what counts."""
        fresh = world.model("projector")
        optimizer = torch.optim.AdamW(fresh.projector.parameters())
        with redirect_stdout(StringIO()) as said:
            history, _ = TrainingState(found.parent.parent, "t", {"k": 1}).load(fresh, optimizer, None)
        if not history:
            raise PipelineError(said.getvalue().splitlines()[0], code=ARTEFACT)

    return states.at(1), opened


KINDS = {
    "tokens": tokens, "features_meta": meta, "projector": model(False), "model": model(True), "export": export, "state": state,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_flip_or_a_cut_anywhere_is_noticed_and_its_file_named(world: World, tmp_path: Path, kind: str) -> None:
    assert unnoticed(*KINDS[kind](world, tmp_path), flips=24, cuts=8) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_three_thousand_flips_and_two_hundred_cuts(world: World, tmp_path: Path, kind: str) -> None:
    assert unnoticed(*KINDS[kind](world, tmp_path), flips=3000, cuts=200, seed=1) == []


def test_the_trials_themselves_notice_what_is_not_verified(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    found = unnoticed(tmp_path, lambda _: None, flips=5, cuts=5)
    assert len(found) == 10
    assert all(re.match(r"a: (bit|cut at) .*: not noticed", line) for line in found)


def test_a_frozen_language_model_is_known_by_its_files(world: World, tmp_path: Path) -> None:
    llm = shutil.copytree(world.llm, tmp_path / "llm")
    manifest = manifest_of(world, own_llm=False)
    manifest.llm.update(model=str(llm), files=checkpoint.language_model_files(str(llm)))
    checkpoint.save(tmp_path / "m", world.model(), manifest, world.builder)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= manifest.llm["files"].keys()
    checkpoint.load(tmp_path / "m")
    data = bytearray((llm / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (llm / "model.safetensors").write_bytes(data)
    with pytest.raises(PipelineError, match=r"llm/model\.safetensors: has changed since .*m was trained with it -> bring it back"):
        checkpoint.load(tmp_path / "m")
