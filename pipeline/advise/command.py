"""The command `python -m pipeline.advise`: the data are counted, a sample is timed, and what follows is told."""

import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import typer

from pipeline.advise.rates import time_reading
from pipeline.advise.telling import as_lines
from pipeline.advise.verdict import Advice, choose
from pipeline.check import (
    STAGES,
    Rates,
    Size,
    Work,
    encoder_shape,
    make_work,
    measure_size,
    sample_pictures,
    sampled_run,
    time_pictures,
    write_sample,
    write_store,
)
from pipeline.core import enter_project, exit_on_error, main_checkout, merged_tokens, quiet_libraries
from pipeline.core.devices import pick_batch, pick_device, pick_workers, use_device, use_fast_float32
from pipeline.features import Encoder, FusedEncoder, load_encoder, member_folders
from pipeline.params import Params, check, override, read_yaml
from pipeline.records import Mixture, Source, no_pictures, open_dataset
from pipeline.text import PromptBuilder

SAMPLES = 16  # pictures that decoding is timed on
SECONDS = 4.0  # of warm-up, and of timing, of each stage's steps

app = typer.Typer(add_completion=False)


@app.command()
def main(
    changes: Annotated[list[str] | None, typer.Argument(help="Keys to try with other values: pretrain.epochs=10.")] = None,
) -> None:
    """Does caching features pay for these data, this encoder, this language model and so many epochs?

    Decoding, the encoder, the disk and training steps are timed on this machine, with the first rows of the data; nothing is
    kept. Under a minute, longer where a batch of the encoder or a step takes seconds.
    """
    exit_on_error(lambda: _main(changes or []))


def _main(changes: list[str]) -> None:
    enter_project()
    content = read_yaml(Path("params.yaml"))
    override(content, changes)
    params = check(content, where="params.yaml")
    for line in as_lines(advise(params)):
        print(line)


def advise(params: Params) -> Advice:
    """Count the data, time a sample and choose; raises `PipelineError` as the stages would."""
    quiet_libraries()
    warnings.simplefilter("ignore")  # Pillow's, of metadata that decide nothing
    device = pick_device(params.runtime.device)
    use_device(device)
    use_fast_float32()
    encoder = load_encoder(params.vision, device=device, batch=pick_batch(params.runtime.extract_batch, device))
    place = main_checkout() / params.runtime.feature_stores[0]
    place = next(folder for folder in (place, *place.parents) if folder.is_dir())  # on the disk that features go to
    with tempfile.TemporaryDirectory(dir=place, prefix=".glance-advise-") as folder:
        return _measure(params, encoder, Path(folder))


def _measure(params: Params, encoder: Encoder | FusedEncoder, folder: Path) -> Advice:
    sources = {name: open_dataset(getattr(params.data, name), limit=params.data.limit) for name in STAGES}
    times = time_pictures(encoder, _pictures(sources["pretrain"]), workers=pick_workers(params.runtime.workers))
    encoder.drop_tower()
    rows, works, extracted = list[tuple[float, float, float]](), list[Work](), None
    for name, source in sources.items():
        size = measure_size(source, getattr(params.data, name).images)
        extracted = extracted or size
        rows.append(_write(params, name, source, encoder, folder / name))
        works.append(_work(params, name, size, extracted, encoder, folder / name))
    rates = Rates(times, *rows[0])
    shape, memory = encoder_shape(params), _free_memory()
    fits = works[0].pictures * shape.row < memory
    return Advice(
        params=params,
        device=encoder.device.type,
        shape=shape,
        rates=rates,
        pictures=works[0].pictures,
        memory=memory,
        free=shutil.disk_usage(folder).free,
        work=works,
        choices=[choose(rates, work, in_memory=fits) for work in works],
    )


def _pictures(source: Source | Mixture) -> list[bytes]:
    if found := sample_pictures(source, SAMPLES):
        return found
    raise no_pictures("data.pretrain")


def _write(
    params: Params, name: str, source: Source | Mixture, encoder: Encoder | FusedEncoder, folder: Path
) -> tuple[float, float, float]:
    """A sample of the data set's rows in `folder`; seconds of a row of features, to disk, from memory and from disk."""
    llm = params.llm
    tokens = merged_tokens(encoder.tokens, params.projector.factor)
    builder = PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=tokens, date=llm.date)
    tables = [write_sample(folder, table, source, builder, params.tokenize) for table in (name, "heldout")]
    stores = member_folders(folder / "features", len(encoder.members))
    writing = sum(write_store(store, member, tables) for store, member in zip(stores, encoder.members, strict=True))
    if not tables[0].slots:
        return 0.0, 0.0, 0.0
    warm, cold = zip(*(time_reading(store, encoder.device) for store in stores), strict=True)
    return writing, sum(warm), sum(cold)


def _work(params: Params, name: str, size: Size, extracted: Size, encoder: Encoder | FusedEncoder, folder: Path) -> Work:
    """What the stage has to do, its steps timed."""
    fresh = size.beyond(extracted) if size is not extracted else size.pictures
    with sampled_run(params, name, folder) as run:
        return make_work(params, run, size, encoder, fresh=fresh, seconds=SECONDS)


def _free_memory() -> int:
    """Bytes that are free, or that the system would free; 0 where it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 0
