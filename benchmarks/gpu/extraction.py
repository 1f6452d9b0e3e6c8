"""From image files to shards on disk with the stage's own `extract` and a worker a core, beside decoding alone."""

import time
from collections.abc import Iterator

from benchmarks.gpu.runner import Figures, Setting
from benchmarks.gpu.world import SIZE, Bench, cores
from pipeline.features.decoding import DecodedImages, decoded_batches
from pipeline.features.encoder.preprocess import Preprocessor

ENCODERS = ("b16", "l14-336")
DECODED_ALONE = "b16"  # decoding hardly depends on the encoder, only on the size that pictures are shrunk to


def measure(setting: Setting) -> Iterator[Figures]:
    """Images/s of decoding alone and of extraction, both from the start of their workers on; of the latter the waiting."""
    bench = Bench(setting)
    bench.pictures()
    yield {"workers": cores(), "picture": f"JPEG, {SIZE[0]} x {SIZE[1]}"}
    decoding = _decode(bench)
    yield {DECODED_ALONE: {"decoding_alone_images_per_second": round(decoding, 1)}}
    for name in ENCODERS:
        told = bench.extracted(name)
        figures = {
            "images": told["images"],
            "images_per_second": round(told["images_per_second"], 1),
            "waiting_share": round(told["waiting_share"], 4),
            "decode_ms": round(told["decode_ms"], 3),
            "gb": round(told["bytes"] / 1e9, 3),
        }
        if name == DECODED_ALONE:
            figures["share_of_decoding_alone"] = round(told["images_per_second"] / decoding, 3)
        yield {name: figures}


def _decode(bench: Bench) -> float:
    """Pictures a second that the workers decode when nobody else does anything."""
    files, hashes = bench.files(DECODED_ALONE)  # they are in memory afterwards, for both sides
    images = DecodedImages(files, hashes, Preprocessor(str(bench.encoder_folder(DECODED_ALONE))))
    began = time.perf_counter()
    for _ in decoded_batches(images, batch=bench.batch, workers=cores()):
        pass
    return len(files) / (time.perf_counter() - began)
