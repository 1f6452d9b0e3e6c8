"""What the training stages take, from steps and answers timed on a sample of the rows; for small models that are at hand."""

import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from pipeline.check.costs import CHEAP, PictureTime, Rate, weights_size
from pipeline.check.facts import seconds_text
from pipeline.check.sample import ROWS, Size, write_sample, write_store
from pipeline.check.seconds import Rates, Work, live_seconds, stored_seconds
from pipeline.check.survey import Report
from pipeline.check.timing import CPU_FLOPS, LEAST, STEP, HeldoutTime, rows_a_visit, sampled_run, time_heldout, time_steps
from pipeline.core import PipelineError, merged_tokens
from pipeline.core.devices import pick_batch, pick_device, use_device, use_fast_float32
from pipeline.features import Encoder, FusedEncoder, load_encoder, member_folders
from pipeline.params import Params, Training
from pipeline.records import Mixture, Source
from pipeline.text import PromptBuilder, TokenTable
from pipeline.vlm.training import TrainingRun

STAGES = ("pretrain", "sft")
SECONDS = 1.5  # of warm-up, and of timing, of each stage's steps


@dataclass(frozen=True, slots=True)
class Part:
    """A data set as training sees it: where its rows come from, how many there are, distinct pictures, places of pictures."""

    source: Source | Mixture
    rows: int
    pictures: int
    slots: int


def make_part(report: Report, source: Source | Mixture, share: float) -> Part:
    """`share`: of its rows and pictures that belong to it."""
    rows = report.good - report.lengths.refused
    return Part(source, round(share * rows), round(share * len(report.pictures.contents)), round(share * report.slots))


def training_costs(params: Params, parts: dict[str, Part], rate: Rate | None) -> list[str]:
    """A line for each stage: its steps and held-out rows, and its seconds on this machine where they can be had in a few.

    Args:
        parts: `pretrain`, `sft` and `heldout`.
        rate: pictures a second of the encoder, for a stage that has it live.
    """
    lines, timed = list[str](), _is_cheap(params)
    encoder = None
    for name in STAGES:
        if not parts[name].rows:
            continue
        try:
            encoder = encoder or (_load_encoder(params) if timed else None)
            seconds = _stage_seconds(params, name, parts, rate, encoder) if encoder else None
        except PipelineError:  # the figures stand without it; the stage will say what is wrong
            seconds = None
        when = "time unknown, `glance advise` measures it" if seconds is None else f"about {seconds_text(seconds)} on this machine"
        held = _heldout_rows(params, parts)
        steps = _steps(getattr(params, name), parts[name])
        dealt = "about " if params.data.heldout.share else ""  # by pictures, and those by chance
        told = f"{dealt}{steps:,} step{'s' * (steps != 1)}, then {held:,} held-out row{'s' * (held != 1)}"
        lines.append(f"{name}: {told}; {when}{' with one process' if seconds and params.runtime.processes > 1 else ''}")
    return lines


def _is_cheap(params: Params) -> bool:
    """Whether all models are folders whose weights are loaded in a moment."""
    sizes = [weights_size(model) for model in (*(member.model for member in params.vision.members), params.llm.model)]
    return all(sizes) and sum(sizes) <= CHEAP


def _load_encoder(params: Params) -> Encoder | FusedEncoder:
    device = pick_device(params.runtime.device)
    use_device(device)
    use_fast_float32()
    encoder = load_encoder(params.vision, device=device, batch=pick_batch(params.runtime.extract_batch, device))
    encoder.drop_tower()  # its time is known
    return encoder


def _steps(training: Training, part: Part) -> int:
    return -(-part.rows // training.batch_size) * training.epochs


def _heldout_rows(params: Params, parts: dict[str, Part]) -> int:
    rows = parts["heldout"].rows
    return min(rows, params.evaluate.limit) if params.evaluate.limit else rows


@dataclass(frozen=True, slots=True)
class Measured:
    """Of a stage on a sample: seconds until its parts were loaded, its work with the seconds of a row, and those of measuring
    `asked` held-out rows."""

    loading: float
    work: Work
    heldout: HeldoutTime
    asked: int


def total_seconds(params: Params, measured: Measured, parts: dict[str, Part], encoding: float) -> float:
    """Of loading, training and measuring; `encoding`: seconds of a picture, for a stage that has the encoder live."""
    work, held = measured.work, _heldout_rows(params, parts)
    training: Training = getattr(params, work.name)
    rates = Rates(PictureTime(0.0, encoding, beside=False), 0.0, 0.0, 0.0)
    if training.features == "live":
        spent = live_seconds(rates, work, work.epochs) + parts["heldout"].pictures * encoding
    else:
        spent = stored_seconds(rates, work, work.epochs, in_memory=True)
    if every := params.evaluate.every:
        spent += _steps(training, parts[work.name]) // every * held * measured.heldout.loss
    return measured.loading + spent + measured.heldout.of(held, measured.asked)


def _stage_seconds(
    params: Params, name: str, parts: dict[str, Part], rate: Rate | None, encoder: Encoder | FusedEncoder
) -> float | None:
    """None where the stage wants the encoder live and that one's rate is not known."""
    if getattr(params, name).features == "live" and rate is None:
        return None
    with tempfile.TemporaryDirectory(prefix="glance-check-") as folder, redirect_stderr(StringIO()):  # its bars
        _write_inputs(params, name, parts, encoder, Path(folder))
        measured = _measure(params, name, parts[name], encoder, Path(folder))
    return total_seconds(params, measured, parts, 1 / rate.images if rate else 0.0)


def _measure(params: Params, name: str, part: Part, encoder: Encoder | FusedEncoder, folder: Path) -> Measured:
    began = time.perf_counter()
    with sampled_run(params, name, folder) as run:
        loading = time.perf_counter() - began
        work = make_work(params, run, part, encoder, fresh=0, seconds=SECONDS)
        return Measured(loading, work, time_heldout(run), len(run.heldout.table))


def make_work(
    params: Params, run: TrainingRun, size: Part | Size, encoder: Encoder | FusedEncoder, *, fresh: int, seconds: float
) -> Work:
    """What a stage has to do with a data set of that size, its steps timed on a sample for so many seconds, twice."""
    training: Training = getattr(params, run.name)
    return Work(
        name=run.name,
        train=training.train,
        rows=size.rows,
        pictures=size.pictures,
        fresh=fresh,
        visits=round(size.slots / rows_a_visit(run)),
        kept=params.runtime.live_cache_mb * 1_000_000 // (encoder.tokens * encoder.width * 2),
        epochs=training.epochs,
        step=time_steps(run, seconds=seconds),
    )


def _write_inputs(params: Params, name: str, parts: dict[str, Part], encoder: Encoder | FusedEncoder, folder: Path) -> None:
    """Token tables and features of a sample of the stage's rows and of the held-out ones."""
    llm = params.llm
    tokens = merged_tokens(encoder.tokens, params.projector.factor)
    builder = PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=tokens, date=llm.date)
    table = write_sample(folder, name, parts[name].source, builder, params.tokenize)
    most = ROWS if encoder.device.type != "cpu" else _few_enough(llm.model, table)
    held = write_sample(folder, "heldout", parts["heldout"].source, builder, params.tokenize, most=most)
    for store, member in zip(member_folders(folder / "features", len(encoder.members)), encoder.members, strict=True):
        write_store(store, member, (table, held))


def _few_enough(llm: str, table: TokenTable) -> int:
    """Held-out rows that a CPU answers in a moment; weights have at least two bytes a parameter."""
    return max(LEAST, min(ROWS, int(CPU_FLOPS * STEP / (weights_size(llm) * float(table.lengths.mean())))))
