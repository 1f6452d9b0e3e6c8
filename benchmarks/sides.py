"""One turn of one side of the engine's benchmark, in a process of its own, so that its peak memory is its own.

Reads a `Turn` as JSON from the command line; the last line it prints is a JSON object: samples, seconds, peak_gb (above
what Python and its libraries take), and what else the side tells. Loading and a first short run are not in the seconds.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from benchmarks.naive import RECIPES, NaiveModel, Recipe, Rows, make_loader, masked_loss, train_naive
from benchmarks.world import IMAGE_TOKEN, World
from pipeline.core.devices import peak_memory_gb, use_fast_float32
from pipeline.core.frame import exit_on_error
from pipeline.core.quiet import quiet_libraries
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.sources import FeatureSource, LiveFeatures, StoredFeatures
from pipeline.features.store.store import FeatureStore
from pipeline.records.images import ImageRoot
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import TokenTable
from pipeline.vlm.batches.collate import collate
from pipeline.vlm.batches.examples import Examples
from pipeline.vlm.batches.loader import plan_micro_batches
from pipeline.vlm.batches.plan import plan_epoch
from pipeline.vlm.batches.schedule import Execution, Schedule
from pipeline.vlm.batches.sharing import LONGEST, Sharing, find_sharing, no_sharing
from pipeline.vlm.model.attention import choose_attention
from pipeline.vlm.model.freezing import freeze
from pipeline.vlm.model.language_model import hidden_size, load_language_model
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel
from pipeline.vlm.training.loop import MIXED, train

CPU = torch.device("cpu")
LIVE_CACHE, MICRO_TOKENS, EXTRACT_BATCH, SHARD_ROWS, THREADS, SEED = 512_000_000, 16384, 16, 4096, 2, 0  # as params.yaml has them
Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """What a process is to do: `side` is a key of `SIDES`, the rest are its settings."""

    world: str
    side: str
    stage: str = "pretrain"
    model: str = "minimind"
    table: str = "captions"
    rows: int = 16
    precision: str = "float32"
    length: int = 0
    batch_size: int = 0
    share_images: bool = False
    compiled: bool = False
    factor: int = 1  # of shuffled patches a token; the table is tokenised for it


def peak_gb() -> float:
    """Largest resident memory so far. Not ru_maxrss where the kernel tells more: that one inherits the parent's peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_gb(CPU)
    found = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
    return int(found.split()[1]) * 1024 / 1e9


def _recipe(turn: Turn) -> Recipe:
    """MiniMind-V's numbers for the stage, with another padded length or batch when the turn asks for one."""
    recipe = RECIPES[turn.stage]
    return replace(recipe, length=turn.length or recipe.length, batch_size=turn.batch_size or recipe.batch_size)


def _schedule(turn: Turn) -> Schedule:
    recipe = _recipe(turn)
    return Schedule(
        epochs=1, batch_size=recipe.batch_size, micro_tokens=MICRO_TOKENS, lr=recipe.lr, warmup=0.0, min_lr=0.1,
        weight_decay=0.01, clip_norm=recipe.clip_norm, seed=SEED,
    )  # fmt: skip


def _encoder(world: World, turn: Turn) -> Encoder:
    return Encoder(str(world.clip), precision=turn.precision, device=CPU, batch=EXTRACT_BATCH)


def _sharing(turn: Turn, table: TokenTable) -> Sharing:
    return find_sharing(table) if turn.share_images else no_sharing(table.lengths)


def _our_model(world: World, turn: Turn, encoder: Encoder, table: TokenTable) -> VisionLanguageModel:
    frozen = turn.stage == "pretrain"
    dtype = torch.bfloat16 if frozen and turn.precision == "bfloat16" else torch.float32
    language_model = load_language_model(str(world.llm(turn.model)), dtype=dtype)
    torch.manual_seed(SEED)
    merge = "shuffle" if turn.factor > 1 else "none"
    projector = build_projector("linear", encoder.width, hidden_size(language_model), merge, turn.factor)
    model = VisionLanguageModel(projector, language_model)
    longest = LONGEST if turn.share_images else int(table.lengths.max())
    model.language_model.set_attn_implementation(choose_attention(model.language_model, CPU, longest))
    freeze(model, "projector" if frozen else "all")
    return model


def _source(world: World, turn: Turn, encoder: Encoder, table: TokenTable) -> FeatureSource:
    if turn.stage == "pretrain":
        return StoredFeatures(FeatureStore(world.features), table)
    return LiveFeatures(encoder, ImageRoot(world.images), table, cache_bytes=LIVE_CACHE)


def _image_id(world: World, turn: Turn, tokens: int) -> int:
    return PromptBuilder(str(world.llm(turn.model)), image_token=IMAGE_TOKEN, tokens=tokens).image_id


def ours(world: World, turn: Turn) -> Result:
    """Our engine, put together as a stage does, with a fresh source so that no picture is known beforehand."""
    use_fast_float32()
    table = TokenTable(world.tokens(turn.table), limit=turn.rows)
    schedule, accelerator = _schedule(turn), Accelerator(mixed_precision=MIXED[turn.precision], cpu=True)
    encoder = _encoder(world, turn)
    model = _our_model(world, turn, encoder, table)
    image_id = _image_id(world, turn, table.spec["tokens"])

    def run(rows: int) -> list[dict[str, float]]:
        part = TokenTable(world.tokens(turn.table), limit=rows)
        source = _source(world, turn, encoder, part)
        sharing = _sharing(turn, part)
        examples = Examples(part, source, image_id, sharing, turn.factor)
        execution = Execution(name="ours", threads=THREADS, compiled=turn.compiled)
        return train(model, examples, schedule, accelerator, execution=execution)

    run(turn.rows)  # makes oneDNN's programs, one a shape, or a compiler's; the naive side has one shape and needs one step
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # or the next run would wrap its forward a second time
    began = time.perf_counter()
    history = run(turn.rows)
    seconds = time.perf_counter() - began
    tokens, padding = _tokens(table, schedule, _sharing(turn, table))
    return {"samples": len(table), "seconds": seconds, "tokens": tokens, "padding": padding, "loss": history[-1]["loss"]}


def _tokens(table: TokenTable, schedule: Schedule, sharing: Sharing) -> tuple[int, float]:
    """Tokens of an epoch's batches, and what share of their positions holds none."""
    works = plan_micro_batches(table, schedule, 0, sharing=sharing)
    lengths = [np.array([sharing.unit_length(unit) for unit in work.units]) for work in works]
    tokens = sum(int(found.sum()) for found in lengths)
    return tokens, 1 - tokens / sum(int(found.max()) * len(found) for found in lengths)


def _naive_rows(world: World, turn: Turn, tokens: int) -> Rows:
    return Rows(
        world.records(turn.table), world.images, llm=world.llm(turn.model), clip=world.clip,
        length=_recipe(turn).length, image_token=IMAGE_TOKEN, tokens=tokens,
    )  # fmt: skip


def _naive_model(world: World, turn: Turn, image_id: int) -> NaiveModel:
    train_all = _recipe(turn).train_all
    return NaiveModel(world.clip, world.llm(turn.model), image_id=image_id, train_all=train_all, projector_seed=SEED)


def naive(world: World, turn: Turn) -> Result:
    """MiniMind-V's way over the same rows; each of its steps takes the rows that ours takes."""
    table = TokenTable(world.tokens(turn.table), limit=turn.rows)
    recipe, tokens = _recipe(turn), table.spec["tokens"]
    rows = _naive_rows(world, turn, tokens)
    model = _naive_model(world, turn, table.spec["image_id"])

    def run(count: int) -> list[float]:
        lengths = table.lengths[:count]
        steps = plan_epoch(lengths, batch_size=recipe.batch_size, seed=SEED, epoch=0)
        return train_naive(model, make_loader(rows, steps), recipe, steps=len(steps), precision=turn.precision)

    run(min(turn.rows, recipe.batch_size))
    began = time.perf_counter()
    losses = run(turn.rows)
    seconds = time.perf_counter() - began
    padding = 1 - float(table.lengths.mean()) / recipe.length
    return {"samples": len(table), "seconds": seconds, "padding": padding, "loss": losses[-1]}


def same_work(world: World, turn: Turn) -> Result:
    """One batch through both sides in float32, from the same weights: their losses, and how far their gradients differ."""
    table = TokenTable(world.tokens(turn.table), limit=turn.rows)
    step = plan_epoch(table.lengths, batch_size=_recipe(turn).batch_size, seed=SEED, epoch=0)[0]
    encoder = _encoder(world, turn)
    image_id = _image_id(world, turn, encoder.tokens)
    sharing = _sharing(turn, table)
    batch = collate(table, sharing.units(step), image_id=image_id, tokens=encoder.tokens, sharing=sharing)
    source = LiveFeatures(encoder, ImageRoot(world.images), table)
    model = _our_model(world, turn, encoder, table)
    with FlopCounterMode(display=False) as encoding:
        features = source.features(source.load(batch.slots))
    with FlopCounterMode(display=False) as training:
        loss = model(batch, features)[0] / len(batch.labels)
        loss.backward()
    model_naive, rows = _naive_model(world, turn, image_id), _naive_rows(world, turn, encoder.tokens)
    ids, following, targets, pixels = (torch.stack(parts) for parts in zip(*(rows[int(row)] for row in step), strict=True))
    loss_naive = masked_loss(model_naive(ids, pixels), following, targets)
    loss_naive.backward()
    pairs = [(model.projector[0].weight, model_naive.vision_proj.weight)]
    if _recipe(turn).train_all:
        last = [part.language_model.get_decoder().layers[0].mlp.down_proj.weight for part in (model, model_naive)]
        pairs.append((last[0], last[1]))
    distances = [float((a.grad - b.grad).norm() / b.grad.norm()) for a, b in pairs]  # type: ignore[operator, union-attr]
    told = {"ours": loss.item(), "naive": loss_naive.item(), "gradient_distance": max(distances)}
    picture = encoding.get_total_flops() / encoder.batch if turn.stage == "sft" else 0.0  # one call, filled up
    useful = batch.tokens / batch.ids.numel()  # of this step, which is padded more than those of many rows
    return told | {"flops_per_sample": training.get_total_flops() * useful / len(step) + picture}


def _files(world: World, count: int) -> list[Path]:
    found = sorted(world.images.iterdir(), key=lambda path: int(path.stem))
    return [found[i % len(found)] for i in range(count)]


def extract_ours(world: World, turn: Turn) -> Result:
    """The stage's work from files to shards on disk; then the encoder alone, from pixels to features."""
    use_fast_float32()
    encoder, files = Encoder(str(world.clip), precision=turn.precision, device=CPU, batch=EXTRACT_BATCH), _files(world, turn.rows)
    names = [file.name for file in files[:EXTRACT_BATCH]]
    pixels = torch.from_numpy(np.stack([encoder.preprocess(file.read_bytes(), where=file.name) for file in files[:EXTRACT_BATCH]]))
    plain = Encoder(str(world.clip), precision="float32", device=CPU, batch=1)  # a call is filled up to its batch
    with FlopCounterMode(display=False) as counter:  # multiplications and additions count one each
        plain.encode(pixels[:1], names[:1])
    del plain
    encoder.relative_error()  # once a run, as loading is
    encoder.encode(pixels, names)
    root = ImageRoot(world.images)
    with tempfile.TemporaryDirectory(dir=world.folder) as folder:
        began = time.perf_counter()
        distinct, hashes = distinct_images([(root, [file.name for file in files])], threads=THREADS)
        extract(
            distinct, hashes, encoder,
            stores=[Path(folder) / "shards"], out=Path(folder) / "features", shard_rows=SHARD_ROWS, workers=THREADS,
        )  # fmt: skip
        seconds = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(0, len(files), EXTRACT_BATCH):
        encoder.encode(pixels, names)
    encoding = (time.perf_counter() - began) / len(range(0, len(files), EXTRACT_BATCH)) / len(pixels)
    return {
        "samples": len(distinct),
        "seconds": seconds,
        "flops": counter.get_total_flops(),
        "encode_per_second": 1 / encoding,
    }


def extract_naive(world: World, turn: Turn) -> Result:
    """Transformers' own way, sixteen pictures a call, in float32: open, processor, model, hidden states."""
    model: Any = CLIPVisionModel.from_pretrained(world.clip, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(world.clip)
    files = _files(world, turn.rows)

    @torch.no_grad()
    def run(files: list[Path]) -> None:
        for start in range(0, len(files), EXTRACT_BATCH):
            pictures = [Image.open(file).convert("RGB") for file in files[start : start + EXTRACT_BATCH]]
            inputs = processor(images=pictures, return_tensors="pt")
            model(**inputs).last_hidden_state[:, 1:].numpy()

    run(files[:EXTRACT_BATCH])
    began = time.perf_counter()
    run(files)
    return {"samples": len(files), "seconds": time.perf_counter() - began}


def matrix_rate(_: World, turn: Turn) -> Result:
    """Floating-point operations a second of the best bfloat16 matrix product this machine shows, over several shapes."""
    sizes = [(1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096), (3152, 768, 3072), (8192, 1024, 4096)]
    best = 0.0
    for rows, inner, columns in sizes[: 1 if turn.rows < EXTRACT_BATCH else None]:
        a, b = torch.randn(rows, inner, dtype=torch.bfloat16), torch.randn(inner, columns, dtype=torch.bfloat16)
        for _attempt in range(8):
            began = time.perf_counter()
            torch.mm(a, b)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - began))
    return {"flops_per_second": best}


SIDES: dict[str, Callable[[World, Turn], Result]] = {
    "ours": ours,
    "naive": naive,
    "same_work": same_work,
    "extract_ours": extract_ours,
    "extract_naive": extract_naive,
    "matrix_rate": matrix_rate,
}


def main(turn: Turn) -> None:
    quiet_libraries()
    before = peak_gb()
    result = SIDES[turn.side](World(Path(turn.world)), turn)
    print(json.dumps(result | {"peak_gb": peak_gb() - before}))


if __name__ == "__main__":
    exit_on_error(lambda: main(Turn(**json.loads(sys.argv[1]))))
