"""A benchmark's questions through a model, a part at a time: every answer to a table, and the figures of them.

The pictures go through the encoder once, into the store that all experiments share, and never again under this encoder.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import Accelerator
from tqdm import tqdm

from pipeline.chat.assistant import Assistant, user_turn
from pipeline.core import BAD_ROWS, PipelineError, main_checkout, make_folder, publish_folder, to_json, writing
from pipeline.core.devices import pick_batch, pick_device, pick_workers, use_fast_float32
from pipeline.features import FeatureStore, ImageFile, NoFeatures, extract, member_folders, stored_features
from pipeline.params import Params
from pipeline.records import Record, Turn
from pipeline.score.benchmark import Asked, Benchmark
from pipeline.score.figures import Scored, summarise
from pipeline.score.tasks import Question, Task
from pipeline.text import RowTokenizer, Summary, TokenTable, tokenize, write_tokens
from pipeline.vlm.batches import Examples
from pipeline.vlm.evaluation import (
    Answering,
    answer_questions,
    describe,
    find_questions,
    log_likelihoods,
    make_table,
    writing_tables,
)
from pipeline.vlm.training.loop import MIXED

PART = 8192  # questions that are in memory at once
MICRO_TOKENS = 16384
WORDY = 0.1  # of all answers: more right ones than this that do not count are told


@dataclass(frozen=True, slots=True)
class Model:
    """A trained model that is to be scored, and how."""

    assistant: Assistant
    accelerator: Accelerator
    params: Params

    @classmethod
    def open(cls, folder: Path, params: Params) -> "Model":
        """The checkpoint in `folder`; raises `PipelineError` as chat does."""
        batch = pick_batch(params.runtime.extract_batch, pick_device(params.runtime.device))
        assistant = Assistant(folder, device=params.runtime.device, batch=batch)
        accelerator = Accelerator(mixed_precision=MIXED[assistant.precision], cpu=assistant.device.type == "cpu")
        return cls(assistant, accelerator, params)


def score_task(model: Model, benchmark: Benchmark, out: Path) -> dict[str, Any]:
    """Ask every question with and without its picture; writes `predictions.parquet` and `scores.json` to the folder `out`.

    Returns what scores.json has. Raises `PipelineError` for a row that cannot be asked: none is left out.
    """
    with publish_folder(out) as folder:
        work, answers = folder / "work", folder / "predictions.parquet"
        make_folder(work)
        parts = list(_write_parts(model, benchmark, work))
        if not parts:
            raise PipelineError("no question here", where=str(benchmark.folder), remedy="raise the share", code=BAD_ROWS)
        _extract(model, benchmark, parts, work)
        with writing_tables(answers) as write:
            for rows in _answered(model, benchmark, parts, work):
                write(rows)
        shutil.rmtree(work)
        found = _figures(benchmark, answers)
        with writing(out):
            (folder / "scores.json").write_text(to_json(found), encoding="utf-8")
    return found


def _write_parts(model: Model, benchmark: Benchmark, work: Path) -> Iterator[Path]:
    """The questions as token tables of at most `PART` rows, each with its questions as JSON lines beside it."""
    assistant, task = model.assistant, benchmark.task
    room = (assistant.context or 1 << 30) - task.tokens
    tokenizer = RowTokenizer(assistant.builder, benchmark.images, room, "skip")

    def refuse(row: dict[str, str]) -> None:
        what = f"{row['reason'].partition(',')[0]} and up to {task.tokens} of an answer, the model holds {assistant.context:,}"
        raise PipelineError(what, where=row["where"], remedy="score another task, or a model of a longer context", code=BAD_ROWS)

    asked = benchmark.questions()
    bar = tqdm(desc=f"{benchmark.name}: questions", unit="row", mininterval=0.5)
    with closing(bar):
        for number in count():
            part = list(islice(asked, PART))
            if not part:
                return
            batches = tokenize(
                map(_record, part),
                tokenizer,
                Summary(),
                workers=model.params.runtime.tokenize_workers,
                progress=bar.update,
                refuse=refuse,
            )
            table = work / f"{number}.arrow"
            write_tokens(table, batches, assistant.builder.spec())
            with writing(table):
                lines = (json.dumps(asdict(each.question)) + "\n" for each in part)
                table.with_suffix(".jsonl").write_text("".join(lines), encoding="utf-8")
            yield table


def _record(asked: Asked) -> Record:
    user = user_turn(asked.question.text, range(len(asked.picture)))
    return Record(asked.where, tuple(asked.picture), (user, Turn("assistant", (asked.question.reference,))))


def _extract(model: Model, benchmark: Benchmark, parts: list[Path], work: Path) -> None:
    """The features of all pictures to `work`/features: from the store where it has them, else encoded and added to it."""
    names: dict[bytes, str] = {}
    for part in parts:
        table = TokenTable(part)
        own = table.image_names().to_pylist()
        for number, key in enumerate(map(bytes, table.image_hashes())):
            names.setdefault(key, own[number])
    members, params = model.assistant.encoder.members, model.params
    use_fast_float32()
    for encoder, out in zip(members, member_folders(work / "features", len(members)), strict=True):
        extract(
            [ImageFile(benchmark.images, name) for name in names.values()],
            np.frombuffer(b"".join(names), np.uint8).reshape(-1, 32),
            encoder,
            stores=[main_checkout() / store for store in params.runtime.feature_stores],
            out=out,
            shard_rows=params.vision.shard_rows,
            workers=pick_workers(params.runtime.workers),
        )


def _answered(model: Model, benchmark: Benchmark, parts: list[Path], work: Path) -> Iterator[pa.Table]:
    """The rows of the predictions, a part at a time."""
    assistant, stores = model.assistant, [FeatureStore(folder) for folder in member_folders(work / "features")]
    asking = Answering(benchmark.task.tokens, model.params.runtime.eval_batch, MICRO_TOKENS)
    for part in parts:
        table = TokenTable(part)
        seen = Examples(table, stored_features(stores, table, assistant.device), assistant.builder.image_id, None, assistant.factor)
        unseen = replace(seen, source=NoFeatures(seen.source))
        asked, with_model = find_questions(table), (model.accelerator, assistant.builder)
        answers = answer_questions(assistant.model, seen, *with_model, asking, asked)
        blind = answer_questions(assistant.model, unseen, *with_model, replace(asking, blind=True), asked)
        _, likelihoods = log_likelihoods(assistant.model, seen, model.accelerator, micro_tokens=MICRO_TOKENS)
        columns = describe(table, asked, assistant.builder)
        columns |= {"source": [benchmark.name] * len(asked), "answer": answers, "blind": blind}
        rows = make_table(columns, np.split(likelihoods, np.cumsum(table.supervised)[:-1]), chosen=["exact"])
        questions = [Question(**json.loads(line)) for line in part.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]
        yield _with_scores(rows, questions, benchmark.task)


def _with_scores(rows: pa.Table, questions: list[Question], task: Task) -> pa.Table:
    columns = {
        "references": pa.array([list(asked.references or (asked.reference,)) for asked in questions], pa.list_(pa.string())),
        "group": pa.array([asked.group for asked in questions], pa.string()),
        "unit": pa.array([asked.unit for asked in questions], pa.string()),
    }
    for name, source in (("score", "answer"), ("blind_score", "blind")):
        columns[name] = pa.array(map(task.score, rows[source].to_pylist(), questions), pa.float64())
    for name, column in columns.items():
        rows = rows.append_column(name, column)
    return rows


def _figures(benchmark: Benchmark, path: Path) -> dict[str, Any]:
    rows = pq.read_table(path, columns=["answer", "blind", "reference", "contains", "group", "unit", "score", "blind_score"])
    names = (unit or f"#{number}" for number, unit in enumerate(rows["unit"].to_pylist()))
    units = np.unique(np.array(list(names)), return_inverse=True)[1]
    references, groups = rows["reference"].to_pylist(), rows["group"].to_pylist()
    seen, blind = (
        Scored(rows[score].to_numpy(), rows[answer].to_pylist(), references, groups, units)
        for score, answer in (("score", "answer"), ("blind_score", "blind"))
    )
    found = {"task": benchmark.name, "share": benchmark.share, **summarise(benchmark.task.figures, seen, blind)}
    loose = float(rows["contains"].to_numpy().mean())
    if loose > seen.scores.mean() + WORDY:
        more = "the benchmark counts some other way of answering only; predictions.parquet has them all"
        found["warnings"].append(f"{loose:.0%} of the answers contain the reference, {seen.scores.mean():.0%} count: {more}")
    return found
