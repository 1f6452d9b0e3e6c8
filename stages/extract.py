"""Stage 1: the frozen vision encoder over every image, once.

Reads the images that the pretraining and held-out records name; writes data/features (HDF5 shards, a row an image) and
data/features_meta.json (P and Dv: all that tokenize needs to know).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipeline.datasets import good_rows, open_dataset
from pipeline.extraction import distinct_images, extract
from pipeline.files import main_checkout, write_json
from pipeline.formats import Source
from pipeline.hardware import pick_device, use_fast_float32
from pipeline.params import StageParams
from pipeline.stage import run_stage
from pipeline.vision import Encoder


def main(params: StageParams) -> dict[str, Any]:
    vision, runtime = params.vision, params.runtime
    files, hashes = distinct_images(
        [(source.images, _names(source, params.data)) for source in _sources(params)], threads=max(1, runtime.workers)
    )
    use_fast_float32()
    device = pick_device(runtime.device)
    processes: dict[str, Any] = {}
    if "RANK" in os.environ:
        state = PartialState(cpu=device.type == "cpu")
        device = state.device
        processes = {"rank": state.process_index, "ranks": state.num_processes, "wait": state.wait_for_everyone}
    encoder = Encoder(
        vision.model,
        revision=vision.revision,
        layer=vision.layer,
        precision=vision.precision,
        storage=vision.storage,
        device=device,
        batch=runtime.extract_batch,
    )
    done = extract(
        files,
        hashes,
        encoder,
        stores=[main_checkout() / store for store in runtime.feature_stores],
        out=Path("data/features"),
        shard_rows=vision.shard_rows,
        workers=runtime.workers,
        **processes,
    )
    if not processes.get("rank"):
        write_json(Path("data/features_meta.json"), {"tokens": encoder.tokens, "width": encoder.width})
    rate = round(done.encoded / done.seconds, 1) if done.seconds else 0.0
    return {
        "images": done.images,
        "encoded": done.encoded,
        "cache_mb": round(done.bytes / 1e6, 1),
        "images_per_second": rate,
        "waiting_share": round(done.waited / done.seconds, 3) if done.seconds else 0.0,
    }


def _sources(params: StageParams) -> list[Source]:
    return [open_dataset(dataset, limit=params.data.limit) for dataset in (params.data.pretrain, params.data.heldout)]


def _names(source: Source, data: Any) -> Iterator[str]:
    with good_rows(source, data) as records:
        for record in records:
            yield from record.images


if __name__ == "__main__":
    run_stage("extract", main)
