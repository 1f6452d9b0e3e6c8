"""One language model with one encoder, its sides taking turns in one process, and what caching is worth for the pair.

Before anything is timed one batch goes through the pipeline's model and the plain trainer's in float32, with the same weights:
their losses must agree to 1e-4 and the projector's gradients to 3e-3 (features are stored in float16), or the pair is an error.
Stored rows must be within 1e-2 of what the live encoder gives, relative to their norm: the same bits are expected.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.encoder import PlainTower
from benchmarks.gpu.plain import PlainModel, PlainTrainer, decode_all, make_batch, prepare
from benchmarks.gpu.runner import Figures
from benchmarks.gpu.shapes import RowFacts, llm_config, make_llm, picture_flops, row_flops, tower_config
from benchmarks.gpu.sides import LR, Ours, Plain, TrainingSide
from benchmarks.gpu.world import Bench, cores
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.sources import LiveFeatures, StoredFeatures
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

STORED, LIVE, PLAIN = "ours, stored", "ours, live", "plain, live"
CLOSE, FAR, SAME = 1e-4, 3e-3, 1e-2  # losses, gradients, stored and live rows: relative differences allowed
CHECKED = 4  # rows of the batch that goes through both
BATCH, TINY_BATCH = 64, 4  # rows of a step, as in params.yaml
PASS_TOKENS = 21504  # of all sides: 64 rows with 196 patches, 32 with 576, so that 0.6 B fit on one card
PLAIN_STEPS = 8  # whose pixels are held ready


@dataclass(frozen=True, slots=True)
class Pair:
    """The parts of a comparison, on the device."""

    bench: Bench
    name: str  # the encoder's
    encoder: Encoder
    config: Any
    table: TokenTable
    image_id: int
    train: str
    tower: Any
    pixels: torch.Tensor

    @property
    def batch_size(self) -> int:
        return TINY_BATCH if self.bench.setting.tiny else BATCH

    def facts(self) -> RowFacts:
        """What a row is on average."""
        return RowFacts(
            tokens=float(self.table.lengths.mean()), supervised=float(self.table.supervised.mean()),
            patches=self.encoder.tokens, width=self.encoder.width,
        )  # fmt: skip

    def flops(self, *, live: bool) -> float:
        """Operations a sample, the live encoder's included."""
        own = row_flops(self.config, self.facts(), train_all=self.train == "all")
        return own + (picture_flops(self.tower) if live else 0.0)


Opened = tuple[Encoder, torch.Tensor]  # an encoder, and pixels of the first pictures for the plain side


def open_pair(bench: Bench, encoder_name: str, model_name: str, *, train: str, opened: dict[str, Opened]) -> Pair:
    """Put it together; `opened` keeps by name what several pairs have in common."""
    tiny = bench.setting.tiny
    table, tower = bench.table(encoder_name), tower_config(encoder_name, tiny=tiny)
    if encoder_name not in opened:
        encoder = bench.encoder(encoder_name)
        count = min(len(table), PLAIN_STEPS * (TINY_BATCH if tiny else BATCH))
        files, hashes = bench.files(encoder_name)
        opened[encoder_name] = encoder, decode_all(files[:count], hashes[:count], encoder.preprocess, cores())
    encoder, pixels = opened[encoder_name]
    return Pair(
        bench=bench, name=encoder_name, encoder=encoder, config=llm_config(model_name, tiny=tiny), table=table,
        image_id=int(table.spec["image_id"]), train=train, tower=tower, pixels=pixels,
    )  # fmt: skip


def make_sides(pair: Pair, names: tuple[str, ...]) -> tuple[dict[str, TrainingSide], Figures]:
    """The sides of these names, checked against each other, and how far apart they were. Both of ours share one model."""
    device = pair.bench.device
    llm = make_llm(pair.config, device, torch.float32)
    torch.manual_seed(0)
    model = VisionLanguageModel(build_projector("linear", pair.encoder.width, pair.config.hidden_size).to(device), llm)
    distances = check(pair, model)
    half = device.type == "cuda" and pair.train == "projector"  # frozen weights are held in bfloat16, as a stage does
    model.language_model.to(torch.bfloat16 if half else torch.float32)
    sides: dict[str, TrainingSide] = {}
    if PLAIN in names:
        sides[PLAIN] = _plain(pair, model)
    if LIVE in names:
        live = LiveFeatures(pair.encoder, pair.bench.pictures(), pair.table)
        sides[LIVE] = _ours(pair, model, live, pair.encoder)
    if STORED in names:
        sides[STORED] = _ours(pair, model, StoredFeatures(pair.bench.store(pair.name), pair.table, device), None)
    return {name: sides[name] for name in names}, distances


def _ours(pair: Pair, model: VisionLanguageModel, source: Any, held: Encoder | None) -> Ours:
    return Ours(
        model=model, source=source, table=pair.table, image_id=pair.image_id, device=pair.bench.device,
        batch_size=pair.batch_size, pass_tokens=PASS_TOKENS, train=pair.train, held=held,
    )  # fmt: skip


def _plain_tower(pair: Pair, encoder: Encoder, dtype: torch.dtype) -> PlainTower:
    """The encoder's weights in a plain tower, pixels normalised alike."""
    found = PlainTower(pair.tower, pair.bench.device, dtype, mean=encoder.preprocess.mean, std=encoder.preprocess.std)
    found.tower.load_state_dict(encoder.tower.state_dict())
    return found


def _plain(pair: Pair, model: VisionLanguageModel) -> Plain:
    device, cuda = pair.bench.device, pair.bench.device.type == "cuda"
    tower = _plain_tower(pair, pair.encoder, torch.bfloat16 if cuda else torch.float32)
    plain = PlainModel(tower, copy.deepcopy(model.projector), copy.deepcopy(model.language_model))
    part = TokenTable(pair.table.path, limit=len(pair.pixels))
    works = prepare(
        part, pair.pixels, image_id=pair.image_id, tokens=pair.encoder.tokens, batch_size=pair.batch_size,
        pass_rows=max(1, PASS_TOKENS // int(pair.table.lengths.max())), pin=cuda,
    )  # fmt: skip
    return Plain(PlainTrainer(plain, works, device, lr=LR, train_all=pair.train == "all"))


def check(pair: Pair, model: VisionLanguageModel) -> Figures:
    """One batch in float32 through both; raises AssertionError where they do not do the same work."""
    device, rows = pair.bench.device, np.arange(CHECKED)
    exact = pair.bench.encoder(pair.name, precision="float32", batch=CHECKED)
    tower, pixels = _plain_tower(pair, exact, torch.float32), pair.pixels[:CHECKED]
    freeze(model, "projector")
    batch = collate(pair.table, rows, image_id=pair.image_id, tokens=exact.tokens).to(device)
    features = exact.encode(pixels, ["picture"] * CHECKED).to(device)
    supervised = len(batch.labels)
    ours = model(batch, features)[0] / supervised
    ours.backward()
    plain = PlainModel(tower, copy.deepcopy(model.projector), model.language_model)
    plain.zero_grad(set_to_none=True)
    made = make_batch(pair.table, rows, image_id=pair.image_id, tokens=exact.tokens).to(device)
    theirs = plain(made, pixels.to(device)) / supervised
    theirs.backward()
    (mine,), (other,) = ([p.grad for p in m.projector.parameters() if p.ndim == 2] for m in (model, plain))
    loss, gradient = abs(float(ours.detach() / theirs.detach()) - 1), _distance(mine, other)
    store = pair.bench.store(pair.name)
    stored = store.read(store.locate(pair.table.image_hashes()[:CHECKED]))
    rows_apart = _distance(stored.float(), pair.encoder.encode(pixels, ["picture"] * CHECKED).float().cpu())
    model.zero_grad(set_to_none=True)
    found = {"loss_distance": loss, "gradient_distance": gradient, "stored_live_distance": rows_apart}
    if loss > CLOSE or gradient > FAR or rows_apart > SAME:
        raise AssertionError(f"the sides do not do the same work: {found}")
    return {name: float(f"{value:.2e}") for name, value in found.items()}


def _distance(one: Any, other: Any) -> float:
    return float((one - other).norm() / other.norm())
