"""Tokens a second of greedy answers: the pipeline's `generate` with stored features beside Transformers' with a live tower.

Both continue the same prompts by the same number of tokens, 64 at a time; neither may end early.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.clock import first_call, seconds_a_call, spread
from benchmarks.gpu.encoder import PlainTower
from benchmarks.gpu.runner import Figures, Setting, guarded
from benchmarks.gpu.shapes import llm_config, make_llm, tower_config
from benchmarks.gpu.world import Bench
from pipeline.core.devices import autocast, pick_precision
from pipeline.vlm.model.generation import GREEDY, generate
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.vlm import VisionLanguageModel

ENCODER = "b16"
NEW, TINY_NEW = 32, 4  # tokens an answer
PROMPTS, TINY_PROMPTS = 64, 4
LLMS = ("26m", "0.6b")


def measure(setting: Setting) -> Iterator[Figures]:
    """Generated tokens a second of both sides, for a small and a larger language model."""
    yield {"prompts": TINY_PROMPTS if setting.tiny else PROMPTS, "new_tokens": TINY_NEW if setting.tiny else NEW}
    for name in LLMS:
        yield guarded(name, partial(_model, setting, name))


def _model(setting: Setting, name: str) -> Figures:
    device, count = setting.device, TINY_PROMPTS if setting.tiny else PROMPTS
    new, dtype = TINY_NEW if setting.tiny else NEW, torch.bfloat16 if device.type == "cuda" else torch.float32
    config: Any = llm_config(name, tiny=setting.tiny)
    tower = PlainTower(tower_config(ENCODER, tiny=setting.tiny), device, dtype)
    model = VisionLanguageModel(
        build_projector("linear", tower.tower.config.hidden_size, config.hidden_size).to(device), make_llm(config, device, dtype)
    ).eval()
    sides = {
        "ours, stored": _ours(Bench(setting), model, tower, count, new),
        "plain, live": _plain(setting, model, tower, count, new),
    }
    found = {}
    for side, work in sides.items():
        precision = pick_precision("auto", device) if device.type == "cuda" else "float32"
        with torch.inference_mode(), autocast(precision, device):
            first = first_call(work, device)
            spent = seconds_a_call(work, device, seconds=0.1 if setting.tiny else 1.0)
        found[side] = {"tokens_per_second": spread(count * new / each for each in spent), "first_call_seconds": round(first, 2)}
    return found


def _prompts(bench: Bench, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of the first rows up to their answers, and where their pictures begin."""
    table = bench.table(ENCODER, limit=count)
    rows = [table.row(number) for number in range(count)]
    return [row.ids[: row.spans[-1][0]] for row in rows], [row.image_start for row in rows]


def _ours(bench: Bench, model: VisionLanguageModel, tower: PlainTower, count: int, new: int) -> Callable[[], Any]:
    """As evaluation does it, features at hand in host memory."""
    prompts, starts = _prompts(bench, count)
    features = torch.randn(count, tower.patches, tower.tower.config.hidden_size, dtype=torch.float16)
    builder, device = bench.builder(ENCODER), bench.device
    options = GREEDY | {"min_new_tokens": new}
    return lambda: generate(model, builder, prompts, starts, features, max_new_tokens=new, device=device, **options)


def _plain(setting: Setting, model: VisionLanguageModel, tower: PlainTower, count: int, new: int) -> Callable[[], Any]:
    """Tower, projector, splice, `generate`; pixels and left-padded ids lie on the device."""
    device, (prompts, starts) = setting.device, _prompts(Bench(setting), count)
    width = max(map(len, prompts))
    ids, mask = torch.zeros(2, count, width, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64)), 1
    begins = torch.tensor([int(start[0]) + width - len(prompt) for prompt, start in zip(prompts, starts, strict=True)])
    columns = (begins[:, None] + torch.arange(tower.patches)).to(device)
    row = torch.arange(count, device=device)[:, None].expand_as(columns)
    side = tower.tower.config.image_size
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, device=device)
    ids, mask, llm = ids.to(device), mask.to(device), model.language_model

    def work() -> Any:
        embeddings = llm.get_input_embeddings()(ids)
        projected = model.projector(tower(pixels).to(next(model.projector.parameters()).dtype))
        embeddings = embeddings.index_put((row, columns), projected.to(embeddings.dtype))
        llm_any: Any = llm
        return llm_any.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
        )

    return work
