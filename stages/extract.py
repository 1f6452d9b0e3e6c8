"""Stage 1: the frozen vision encoder over every image of the pretraining and the held-out data, once.

Reads the images that the pretraining and held-out records name. Writes data/features (HDF5 shards: patch features float16
[P, Dv] an image, found by the hash of its bytes), data/features_meta (all that tokenize needs to know: P and Dv in
encoder.json, which images can be decoded in images.npy) and data/features_rejected.csv (which cannot, and why). Which rows
that costs is decided by tokenize.
"""

import csv
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from pipeline.core import PipelineError, main_checkout, publish, publish_folder, to_json, writing
from pipeline.core.devices import pick_batch, pick_device, pick_workers, use_device, use_fast_float32
from pipeline.core.trees import is_first_of_tree, processes_here
from pipeline.features import Extraction, Processes, common_tokens, distinct_images, extract, load_member, member_folders, shape_of
from pipeline.params import StageParams
from pipeline.records import GoodImages, Mixture, Source, good_rows, no_pictures, open_dataset, picture_is_used
from stages.run import run_stage

FEATURES = Path("data/features")


def main(params: StageParams) -> dict[str, Any]:
    vision, runtime = params.vision, params.runtime
    skip, missing = params.data.on_error == "skip", list[PipelineError]()
    device, processes = _processes(pick_device(runtime.device))
    workers, batch = pick_workers(runtime.workers, processes=processes_here()), pick_batch(runtime.extract_batch, device)
    files, hashes = distinct_images(_wanted(params), threads=max(1, workers), missing=missing if skip else None)
    use_fast_float32()
    stores = [main_checkout() / store for store in runtime.feature_stores]
    folders = member_folders(FEATURES, len(vision.members))
    if len(folders) > 1:  # before the first of them works for hours
        common_tokens([(each.model, shape_of(each)[0], each.pool) for each in vision.members])
    if processes.writes and len(folders) > 1:
        shutil.rmtree(FEATURES, ignore_errors=True)
    done, width = [], 0
    for member, out in zip(vision.members, folders, strict=True):
        encoder = load_member(member, device=device, batch=batch)
        tokens, width = encoder.tokens, width + encoder.width
        done.append(
            extract(
                files,
                hashes,
                encoder,
                stores=stores,
                out=out,
                shard_rows=vision.shard_rows,
                workers=workers,
                skip=skip,
                processes=processes,
            )
        )
        del encoder  # its memory goes before the next one comes
    if processes.writes:
        good = np.logical_and.reduce([each.good for each in done])
        _write_meta(tokens, width, hashes[good])
        _write_rejected([*missing, *(error for each in done for error in each.bad)])
    return _figures(done, missing)


def _processes(device: torch.device) -> tuple[torch.device, Processes]:
    """This process's own device and its place among all, where a launcher has started several."""
    if "RANK" not in os.environ:
        use_device(device)
        return device, Processes()
    state = PartialState(cpu=device.type == "cpu")
    return state.device, Processes(state.process_index, state.num_processes, state.wait_for_everyone, is_first_of_tree())


def _figures(done: list[Extraction], missing: list[PipelineError]) -> dict[str, Any]:
    """Of several encoders: `encoded` counts an image once an encoder; `images_per_second` is through all that had work."""
    here, seconds = max(each.here for each in done), sum(each.seconds for each in done)
    return {
        "images": min(each.images for each in done),
        "rejected": len({error.where for error in (*missing, *(error for each in done for error in each.bad))}),
        "encoded": sum(each.encoded for each in done),
        "cache_mb": round(sum(each.bytes for each in done) / 1e6, 1),
        "images_per_second": round(here / seconds, 1) if seconds else 0.0,
        "decode_ms": round(1000 * sum(each.decoding for each in done) / here, 3) if here else 0.0,
        "waiting_share": round(sum(each.waited for each in done) / seconds, 3) if seconds else 0.0,
    }


def _wanted(params: StageParams) -> Iterator[tuple[Any, Iterator[str], Callable[[bytes], bool]]]:
    """Of each data set where its pictures are, their names, and which of them its rows can show: a held-out one is no
    training picture."""
    data = params.data
    sources = [(open_dataset(dataset, limit=data.limit), dataset is data.pretrain) for dataset in (data.pretrain, data.heldout)]
    for source, trained in sources:
        needed = f"data.pretrain: {data.pretrain.records}" if trained else ""
        yield source.images, _names(source, data, needed), picture_is_used(data.heldout, trained=trained)


def _names(source: Source | Mixture, data: Any, needed: str) -> Iterator[str]:
    """The names of a data set's pictures; `needed` names one that must have some."""
    shows = False
    with good_rows(source, data) as records:
        for record in records:
            shows = shows or bool(record.images)
            yield from record.images
    if needed and not shows:
        raise no_pictures(needed)


def _write_meta(tokens: int, width: int, good: np.ndarray) -> None:
    meta = Path("data/features_meta")
    with publish_folder(meta) as folder, writing(meta):
        (folder / "encoder.json").write_text(to_json({"tokens": tokens, "width": width}), encoding="utf-8")
        GoodImages.write(folder / "images.npy", good)


def _write_rejected(bad: list[PipelineError]) -> None:
    table, bad = Path("data/features_rejected.csv"), list({error.where: error for error in bad}.values())
    rows = [(error.where, error.what, error.remedy) for error in bad]
    with (
        publish(table) as temporary,
        writing(table),
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as text,
    ):
        csv.writer(text, lineterminator="\n").writerows([("image", "reason", "remedy"), *rows])
    if bad:
        print(f"extract: {len(bad):,} images left out ({table}), first {bad[0].line()}", flush=True)


if __name__ == "__main__":
    run_stage("extract", main)
