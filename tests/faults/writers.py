"""Every writer of the pipeline as a job that fills a folder, small enough to be struck at each of its calls.

Each is what a stage calls: shards and their list, token tables, tables of pictures, states, checkpoints, single JSON and CSV
files. A job of `STEPS` that is run again ends with the same bytes. `ARTEFACTS` has exports and imported models too.
"""

import atexit
import csv
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from pipeline.core import link_or_copy, make_folder, publish, publish_folder, remove_leftovers, seal, to_json, write_json, writing
from pipeline.export.from_gguf import convert
from pipeline.export.llamacpp import write_gguf
from pipeline.export.marker import write_marker
from pipeline.export.publish import write_stock
from pipeline.export.source import Source
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.store.row_format import Float16Format
from pipeline.features.store.shards import write_shard
from pipeline.features.store.store import INDEX
from pipeline.records import GoodImages
from pipeline.text import PromptBuilder
from pipeline.text.token_table import SCHEMA, write_tokens
from pipeline.vlm.model import Manifest, VisionLanguageModel, build_projector, checkpoint
from pipeline.vlm.training.state import TrainingState

Job = Callable[[Path], None]
ROWS = Float16Format(4, 8)
SPEC = {"features": 1, "tokens": 4, "width": 8, "storage": "float16"}


def hashes(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 255, (count, 32), np.uint8)


def shards(folder: Path) -> None:
    """Two shards into a store, linked into an output with its list; the second is written in two steps (a bad picture)."""
    store, out, keys = folder / "store", folder / "out", hashes(8)
    make_folder(store)
    remove_leftovers(store)
    values = np.random.default_rng(1).normal(size=(8, 4, 8)).astype(np.float16)
    write_shard(store / "a.h5", keys[:4], SPEC, ROWS, [values[:2], values[2:4]])
    written = keys[4:].copy()
    written[1] = 0
    write_shard(store / "b.h5", written, SPEC, ROWS, [values[[4, 6, 7]]])
    make_folder(out)
    for name in ("a.h5", "b.h5"):
        (out / name).unlink(missing_ok=True)
        link_or_copy(store / name, out / name)
    listed = [{"file": "a.h5", "rows": 4}, {"file": "b.h5", "rows": 3}]
    write_json(out / INDEX, seal({"shards": listed, "spec": SPEC}))


def tokens(folder: Path) -> None:
    row = {"ids": list(range(40)), "spans": [30, 40], "image_start": [3], "image_sha256": [bytes(32)], "image_name": ["a.png"]}
    batch = pa.RecordBatch.from_pylist([{**row, "where": f"rows.jsonl:{number}"} for number in range(1, 9)], schema=SCHEMA)
    with publish_folder(folder / "tokens") as temporary:
        write_tokens(temporary / "pretrain.arrow", [batch, batch], {"tokens": 4})


def pictures(folder: Path) -> None:
    with publish_folder(folder / "meta") as temporary, writing(folder / "meta"):
        (temporary / "encoder.json").write_text(to_json({"tokens": 4, "width": 8}), encoding="utf-8")
        GoodImages.write(temporary / "images.npy", hashes(20))
    with publish(folder / "rejected.csv") as temporary, writing(folder / "rejected.csv"), temporary.open("w", newline="") as text:
        csv.writer(text, lineterminator="\n").writerows([("image", "reason"), ("a.png", "empty file")] * 9)


def _trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(16, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(steps):
        model(torch.ones(1, 16)).sum().backward()
        optimizer.step()
    return model, optimizer


def training_state(folder: Path) -> TrainingState:
    return TrainingState(folder / "resume", "sft", {"seed": 0})


def state(folder: Path, *, steps: int = 1) -> None:
    model, optimizer = _trained(steps)
    history = [{"step": number, "loss": 1.0} for number in range(steps)]
    training_state(folder).save(model, optimizer, history, None)


_builders: list[PromptBuilder] = []


def prepare() -> None:
    """Load what jobs share, before processes are forked."""
    if not _builders:
        _builders.append(PromptBuilder("data/models/llm", image_token="<image>", tokens=4))
    _trained(1)


def models(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    llm = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=2, pad_token_id=0))
    vision = {"model": "data/models/clip", "revision": "", "layer": -1, "spec": {**SPEC, "precision": "float32"}}
    named = {"model": "data/models/llm", "revision": "", "image_token": "<image>"}
    manifest = Manifest(vision, named, {"kind": "mlp", "width": 8, "hidden": 16}, own_llm=True)
    checkpoint.save(folder / "model", VisionLanguageModel(build_projector("mlp", 8, 16), llm), manifest, _builders[0])


STEPS: dict[str, list[Job]] = {  # a later state takes an earlier one's place
    "shards": [shards], "tokens": [tokens], "pictures": [pictures], "states": [state, partial(state, steps=2)], "models": [models],
}  # fmt: skip


def write(kind: str, folder: Path) -> None:
    """All steps of a kind."""
    for step in STEPS[kind]:
        step(folder)


@cache
def _source() -> Source:
    """A trained model of few weights with an encoder of its own, as an export opens it."""
    folder = Path(tempfile.mkdtemp(prefix="glance-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    torch.manual_seed(0)
    few = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**few, image_size=16, patch_size=8, projection_dim=8)).save_pretrained(folder / "clip")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder / "clip")
    encoder = Encoder(str(folder / "clip"), precision="float32", device=torch.device("cpu"), batch=1)
    prepare()
    words = len(_builders[0].tokenizer)
    llm = LlamaForCausalLM(LlamaConfig(**few, vocab_size=words, bos_token_id=None, eos_token_id=2, pad_token_id=0))
    vision = {"model": encoder.name, "revision": "", "layer": -1, "precision": "float32", "spec": encoder.spec()}
    named = {"model": "data/models/llm", "revision": "", "image_token": "<image>"}
    manifest = Manifest(vision, named, {"kind": "mlp", "width": 16, "hidden": 16}, own_llm=True)
    checkpoint.save(folder / "model", VisionLanguageModel(build_projector("mlp", 16, 16), llm), manifest, _builders[0])
    write_gguf(Source.open(folder / "model"), folder, dtype="float32")
    return Source.open(folder / "model")


def exports(folder: Path) -> None:
    """A Transformers folder, as `glance export` publishes it once it is proven."""
    with publish_folder(folder / "export") as temporary:
        write_stock(_source(), temporary, "float32")
        write_marker(temporary, _source().manifest, dtype="float32")


def imports(folder: Path) -> None:
    """A language model out of a GGUF file."""
    convert(_source().folder.with_name("model.gguf"), folder / "llm")


ARTEFACTS: dict[str, Job] = {**{kind: partial(write, kind) for kind in STEPS}, "exports": exports, "imports": imports}
