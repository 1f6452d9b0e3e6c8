"""The sections that train: `pretrain` and `sft`, every pair of an encoder and a language model that there is time for."""

import gc
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.ceilings import product_rate
from benchmarks.gpu.pairs import BATCH, LIVE, PASS_TOKENS, PLAIN, STORED, TINY_BATCH, Opened, open_pair
from benchmarks.gpu.rounds import measure_pair
from benchmarks.gpu.runner import Figures, Setting, guarded
from benchmarks.gpu.shapes import MODELS
from benchmarks.gpu.world import Bench
from pipeline.core.devices import use_fast_float32

SIDES = (STORED, LIVE, PLAIN)
ENCODERS = ("b16", "l14-336")
NEEDED = 30  # seconds without which a pair is not begun


def pretrain(setting: Setting) -> Iterator[Figures]:
    """The projector trains, the language model is frozen."""
    return _pairs(setting, [(encoder, model) for encoder in ENCODERS for model in MODELS], "projector")


def sft(setting: Setting) -> Iterator[Figures]:
    """All of the language model and the projector train."""
    return _pairs(setting, [(encoder, "26m") for encoder in ENCODERS], "all")


def _pairs(setting: Setting, pairs: list[tuple[str, str]], train: str) -> Iterator[Figures]:
    use_fast_float32()
    bench = Bench(setting)
    bench.pictures()  # by forked processes, so before the card is asked anything
    limit, opened = product_rate(setting), dict[str, Opened]()
    yield {
        "product_tflops": round(limit / 1e12, 1),
        "batch_size": TINY_BATCH if setting.tiny else BATCH,
        "pass_tokens": PASS_TOKENS,
    }
    for encoder, model in pairs:
        name = f"{model}, {encoder}"
        if not setting.tiny and setting.left < NEEDED:
            yield {name: {"error": f"not begun: {setting.left:.0f} s were left"}}
            continue
        yield guarded(name, partial(_pair, bench, encoder, model, train, opened, limit))
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _pair(bench: Bench, encoder: str, model: str, train: str, opened: dict[str, Opened], limit: float) -> Figures:
    bench.extracted(encoder)  # before anything else is on the card
    return measure_pair(open_pair(bench, encoder, model, train=train, opened=opened), SIDES, limit)
