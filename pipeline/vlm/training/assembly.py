"""A training stage put together: encoder, examples and model as params name them, on the device they ask for."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from pipeline.core.devices import numbered, pick_batch, pick_device, pick_precision, pick_workers, use_device, use_fast_float32
from pipeline.core.trees import processes_here
from pipeline.features import Encoder, FusedEncoder, load_encoder
from pipeline.params import Dataset, StageParams, Training
from pipeline.records import no_pictures
from pipeline.text import PromptBuilder, TokenTable
from pipeline.vlm.batches import LONGEST, Examples, Execution, Schedule, Sharing
from pipeline.vlm.model import (
    PACKED,
    VisionLanguageModel,
    cast_frozen,
    checkpoint,
    choose_attention,
    freeze,
    language_model_files,
    require_fit,
)
from pipeline.vlm.training.loop import MIXED
from pipeline.vlm.training.parts import check_start, choose_sharing, make_builder, make_model, open_feature_sources
from pipeline.vlm.training.tracking import require_tracker

DATA = Path("data")  # of which tokens/ and features/ are read


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """A training stage put together, ready to run.

    Attributes:
        name, start: what it is called, and the checkpoint it goes on from, if any.
        params, training: all that it may read of params.yaml, and its own section.
        precision: float32, bfloat16 or float16.
        encoder: the frozen one; without its weights where features are stored.
        model, attention: what trains, on its device, and the name of its attention.
        examples, heldout: what it trains on, and what it is measured on.
        halved: whether parameters that do not train are held in bfloat16 beside float32 ones that do.
        own_llm: whether the language model is another than the one that `llm` names: trained here, or in what it goes on from.
        frozen_files: `files`, the checksums of that one's, where it is not.
    """

    name: str
    start: Path | None
    params: StageParams
    training: Training
    accelerator: Accelerator
    precision: str
    encoder: Encoder | FusedEncoder
    builder: PromptBuilder
    model: VisionLanguageModel
    attention: str
    examples: Examples
    heldout: Examples
    halved: bool
    own_llm: bool
    frozen_files: dict[str, dict[str, str]]

    @property
    def schedule(self) -> Schedule:
        return Schedule(**{key: getattr(self.training, key) for key in Schedule.__dataclass_fields__})

    @property
    def sharded(self) -> bool:
        """Whether several processes hold a part of every weight each."""
        return self.params.runtime.fsdp and self.accelerator.num_processes > 1

    @property
    def execution(self) -> Execution:
        runtime = self.params.runtime
        return Execution(
            name=self.name,
            threads=max(1, pick_workers(runtime.workers, processes=processes_here())),
            sharded=self.sharded,
            packed=self.attention == PACKED,
            compiled=runtime.compile,
        )

    def untrained(self) -> VisionLanguageModel:
        """The model as training began with it."""
        return make_model(self.params, self.training, self.encoder, self.precision, self.start)


def assemble(
    params: StageParams, training: Training, *, dataset: Dataset, name: str, start: Path | None, data: Path = DATA
) -> TrainingRun:
    """Everything that training on `dataset` needs, its tokens and features below `data`.

    Raises `PipelineError` for parts that do not fit each other.
    """
    require_tracker(params.runtime.track)
    accelerator, precision = _accelerate(params, training)
    device = accelerator.device  # one a process
    encoder = load_encoder(params.vision, device=device, batch=pick_batch(params.runtime.extract_batch, device))
    table, heldout = _tables(data / "tokens", name, params.evaluate.limit)
    if not table.slots and training.train == "projector":
        raise no_pictures(f"data.{name}: {dataset.records}")
    builder = make_builder(params, encoder, table, heldout)
    if start is not None:
        check_start(params, encoder, builder, start)
    model = make_model(params, training, encoder, precision, start)
    require_fit(model.language_model)
    own_llm = training.train != "projector" or (start is not None and checkpoint.read_manifest(start).own_llm)
    files = {} if own_llm else {"files": language_model_files(params.llm.model, revision=params.llm.revision)}
    shared = choose_sharing(training, model, table, name, accelerator)
    # on a GPU held-out rows are not packed, and without that a mask costs more than it saves
    heldout_shared = choose_sharing(training, model, heldout, "heldout", accelerator) if device.type == "cpu" else None
    counts = freeze(model, training.train)
    if halved := training.train == "projector+ends" and precision == "bfloat16":
        cast_frozen(model, torch.bfloat16)
    attention = _set_attention(model, device, (table, heldout), (shared, heldout_shared))
    accelerator.print(
        f"{name}: {counts['projector']:,} projector and {counts['language_model']:,} language-model parameters train, "
        f"{counts['frozen']:,} are frozen; {len(table):,} rows, features {training.features}, {precision} on {numbered(device)}",
        flush=True,
    )
    cache = params.runtime.live_cache_mb * 1_000_000
    source, heldout_source = open_feature_sources(
        training.features, encoder, ((table, dataset), (heldout, params.data.heldout)), cache, data / "features"
    )
    if training.features == "stored":
        encoder.drop_tower()
    return TrainingRun(
        name=name,
        start=start,
        params=params,
        training=training,
        accelerator=accelerator,
        precision=precision,
        encoder=encoder,
        builder=builder,
        model=model.to(device),
        attention=attention,
        examples=Examples(table, source, builder.image_id, shared, params.projector.factor),
        heldout=Examples(heldout, heldout_source, builder.image_id, heldout_shared, params.projector.factor),
        halved=halved,
        own_llm=own_llm,
        frozen_files=files,
    )


def _tables(folder: Path, name: str, limit: int) -> tuple[TokenTable, TokenTable]:
    """What is trained on, and what is measured on, of that `limit` rows."""
    return TokenTable(folder / f"{name}.arrow"), TokenTable(folder / "heldout.arrow", limit=limit)


def _accelerate(params: StageParams, training: Training) -> tuple[Accelerator, str]:
    """accelerate, set up and seeded, and the precision to compute in."""
    device = pick_device(params.runtime.device)
    precision = pick_precision(training.precision, device)
    use_device(device)
    accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=device.type == "cpu")
    use_fast_float32()
    set_seed(training.seed)
    return accelerator, precision


def _set_attention(
    model: VisionLanguageModel, device: torch.device, tables: tuple[TokenTable, TokenTable], shared: tuple[Sharing | None, ...]
) -> str:
    """Choose the attention by the longest row that the model will see, and have the model use it."""
    longest = max(int(table.lengths.max()) for table in tables)
    if any(found is not None for found in shared):
        longest = max(longest, LONGEST)
    attention = choose_attention(model.language_model, device, longest, router_trains=model.router_trains)
    model.language_model.set_attn_implementation(attention)
    return attention
