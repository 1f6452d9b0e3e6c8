"""What extraction will cost: features on disk from the encoder's shape, seconds from a measured sample or the last run."""

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from pipeline.core import PipelineError, brief, costs_of
from pipeline.core.devices import pick_batch, pick_device, pick_workers, use_fast_float32
from pipeline.core.loading import read_pretrained
from pipeline.features import (
    Encoder,
    Float16Format,
    FusedEncoder,
    Int8Format,
    RowFormat,
    common_tokens,
    load_member,
    row_bytes,
    shape_of,
)
from pipeline.params import LanguageModel, Member, Params

CHEAP = 500_000_000  # bytes of weights up to which the encoder is loaded to be timed
WARM, BATCHES = 2, 5  # batches before the clock runs, and the fewest of which the middle one counts
ENOUGH, LONG = 0.5, 10.0  # seconds to time batches for, so that a moment does not decide; and after which one batch is enough


@dataclass(frozen=True, slots=True)
class Shape:
    """Patches an image (P), their width (Dv), bytes of a row of the feature store, its number format."""

    tokens: int
    width: int
    row: int
    storage: str


@dataclass(frozen=True, slots=True)
class Rate:
    """Images a second, and where the figure is from."""

    images: float
    source: str


def encoder_shape(params: Params, meta: Path = Path("data/features_meta/encoder.json")) -> Shape:
    """From the encoders' configurations, or from the last extraction; raises `PipelineError` when neither is there, or when
    their grids are not equal."""
    members, storage = params.vision.members, params.vision.storage
    try:
        found = [_member_shape(member) for member in members]
    except (PipelineError, ValueError, AttributeError, TypeError, ZeroDivisionError) as error:
        try:
            last = json.loads(meta.read_text(encoding="utf-8"))
            found = [_shape(int(last["tokens"]), int(last["width"]), storage)]
        except (OSError, ValueError, KeyError, TypeError):
            if isinstance(error, PipelineError):
                raise error from None
            names = " or ".join(member.model for member in members)
            raise PipelineError(f"cannot load {names}: {brief(error)}", where="vision.model") from None
    else:
        common_tokens([(member.model, shape.tokens, member.pool) for member, shape in zip(members, found, strict=True)])
    return Shape(found[0].tokens, sum(shape.width for shape in found), sum(shape.row for shape in found), storage)


def _member_shape(member: Member) -> Shape:
    """Of one encoder, from its configuration."""
    return _shape(*shape_of(member), member.storage)


def _shape(tokens: int, width: int, storage: str) -> Shape:
    rows: RowFormat = Float16Format(tokens, width)
    if storage == "int8":
        rows = Int8Format(tokens, np.zeros(width), np.ones(width))
    return Shape(tokens, width, row_bytes(rows), storage)


def context_of(llm: LanguageModel) -> int | None:
    """The most tokens that the language model was made for; None where its configuration does not say."""
    try:
        config: Any = read_pretrained(AutoConfig, llm.model, where="llm.model", revision=llm.revision)
        found = getattr(config.get_text_config(), "max_position_embeddings", None)
    except (PipelineError, AttributeError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def extraction_rate(params: Params, samples: list[bytes], metrics: Path = Path("metrics/extract.json")) -> Rate | None:
    """Measured on `samples` where the encoder is small and at hand, else that of the last run of extract, else None."""
    weights = [weights_size(member.model) for member in params.vision.members]
    if samples and all(weights) and sum(weights) <= CHEAP:
        try:
            seconds = sum(_measure(params, member, samples).extraction for member in params.vision.members)
            return Rate(1 / max(seconds, 1e-9), f"measured on {len(samples)} of these pictures")
        except PipelineError:  # the figures stand without it; extract will say what is wrong with the encoder
            pass
    try:
        found = float(costs_of(metrics.read_bytes())["images_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Rate(found, f"as in the last extract, {metrics}") if found > 0 else None


def weights_size(model: str) -> int:
    """Bytes of a model folder's weights; 0 for a hub id."""
    return sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class PictureTime:
    """Seconds of a picture: `decoding` by all the cores that decode together, `encoding` in full batches.

    `beside`: whether both go on at the same time, as with a card; on a CPU they share its cores.
    """

    decoding: float
    encoding: float
    beside: bool

    @property
    def extraction(self) -> float:
        """Of a picture's way from its file to a row."""
        return self.together(self.decoding, self.encoding)

    def together(self, on_host: float, on_device: float) -> float:
        """Of work for the host's cores and work for the device that computes."""
        return max(on_host, on_device) if self.beside else on_host + on_device


def _measure(params: Params, member: Member, samples: list[bytes]) -> PictureTime:
    device = pick_device(params.runtime.device)
    use_fast_float32()
    encoder = load_member(member, device=device, batch=pick_batch(params.runtime.extract_batch, device))
    return time_pictures(encoder, samples, workers=pick_workers(params.runtime.workers))


def time_pictures(encoder: Encoder | FusedEncoder, samples: list[bytes], *, workers: int) -> PictureTime:
    """Decoding and encoding timed apart, both warm; on a slow encoder with fewer batches."""
    pixels = [encoder.preprocess(data, where="sample") for data in samples]
    spent = list[float]()
    while not spent or sum(spent) < ENOUGH / 4:
        began = time.perf_counter()
        for data in samples:
            encoder.preprocess(data, where="sample")
        spent.append(time.perf_counter() - began)
    decoding = statistics.median(spent) / len(samples) / min(max(1, workers), os.cpu_count() or 1)
    batch = torch.from_numpy(np.stack([pixels[i % len(pixels)] for i in range(encoder.batch)]))
    names, taken, gone, begins = ["sample"] * encoder.batch, list[float](), 0.0, time.perf_counter()
    while len(taken) < 2 or ((gone < ENOUGH or len(taken) < WARM + BATCHES) and gone < LONG):
        began = time.perf_counter()
        encoder.encode(batch, names).cpu()
        taken.append(time.perf_counter() - began)
        gone = time.perf_counter() - begins
    encoding = statistics.median(taken[min(WARM, len(taken) - 1) :]) / encoder.batch
    return PictureTime(decoding, encoding, workers > 0 and encoder.device.type != "cpu")
