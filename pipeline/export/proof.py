"""Is an export the model that was trained? Its logits on held-out rows must be the pipeline's own.

The export is read by stock Transformers in a fresh process (`pipeline.export.check`); here are the pipeline's numbers
and the comparison. Shapes: S images of a row, P patches, Dv vision width, K compared positions, V vocabulary.
"""

import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pipeline.chat.assistant import Conversation, Sampling
from pipeline.core import ARTEFACT, PipelineError
from pipeline.export.check import SECONDS
from pipeline.export.source import Source
from pipeline.params import Dataset
from pipeline.records import ImageSlot, Record, Turn, decode, digest, measured_rows, open_dataset

TOLERANCE = 1e-5  # of the largest logit, or of 1 where all are smaller
LIMIT = 7200  # seconds for stock Transformers
SCAN = 10_000  # rows looked through for pictures not shown before


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out conversation and its pictures, as upright RGB in PNG files' bytes."""

    record: Record
    pictures: list[bytes]

    @property
    def question(self) -> str:
        """What the last user turn says, without its pictures."""
        asked = [turn for turn in self.record.turns if turn.role == "user"][-1]
        return " ".join(" ".join(part for part in asked.parts if isinstance(part, str)).split())


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared: the largest difference over all logits, and rows whose text stock code cuts into other ids."""

    model_class: str
    rows: int
    largest: float
    other_ids: int
    question: str
    answer: str


def heldout_rows(dataset: Dataset, count: int) -> list[HeldOut]:
    """Up to `count` rows with pictures, each with one that no earlier row shows; raises `PipelineError` without any."""
    source = open_dataset(dataset)
    seen: set[bytes] = set()
    rows: list[HeldOut] = []
    for record in islice(measured_rows(dataset, source), SCAN):
        files = [source.images.read(name) for name in record.images]
        keys = {digest(data) for data in files}
        if keys - seen:
            rows.append(HeldOut(record, [_png(data, where=name) for data, name in zip(files, record.images, strict=True)]))
            seen |= keys
        if len(rows) == count:
            break
    if not rows:
        raise PipelineError("no row with a picture to prove the export on", where=dataset.records, remedy="set data.heldout")
    return rows


def _png(data: bytes, *, where: str) -> bytes:
    """The picture as this pipeline sees it, so that decoding (transparency, 16 bits) is not what is compared."""
    file = io.BytesIO()
    decode(data, where=where).save(file, "PNG")
    return file.getvalue()


def exact_features(source: Source, pictures: Sequence[bytes]) -> torch.Tensor:
    """Patch features float32 [S, P, Dv] from the pipeline's own encoder, before it rounds them to float16."""
    seen: list[torch.Tensor] = []

    def keep(_: object, __: object, output: Any) -> None:
        last = source.manifest.vision["layer"] == -1
        hidden = output.last_hidden_state if last else output.hidden_states[source.depth]
        seen.append(hidden[:, hidden.shape[1] - source.encoder.tokens :])

    hook = source.encoder.tower.register_forward_hook(keep)
    try:
        source.encoder.encode_files(list(pictures), ["a held-out picture"] * len(pictures))
    finally:
        hook.remove()
    return torch.cat(seen)


def pipeline_logits(source: Source, turns: Sequence[Turn], features: torch.Tensor) -> tuple[list[int], list[int], torch.Tensor]:
    """Ids of a conversation, the positions whose logits predict supervised tokens, and those logits float32 [K, V]."""
    prompt = source.builder.build(turns, trim=False)
    keep = [position - 1 for start, end in prompt.spans for position in range(start, end)]
    starts = torch.tensor(prompt.image_starts, dtype=torch.int64)
    with torch.inference_mode():
        ids = torch.from_numpy(prompt.ids).long()[None]
        embedded = source.model.embed(ids, features, torch.zeros_like(starts), starts)
        output = source.language_model(inputs_embeds=embedded, logits_to_keep=torch.tensor(keep), use_cache=False)
    return prompt.ids.tolist(), keep, output.logits[0].float()


def pipeline_answer(source: Source, question: str, picture: torch.Tensor, *, max_new_tokens: int) -> str:
    """What `pipeline.chat` answers, from a picture's features [P, Dv]."""
    talk = Conversation()
    source.assistant.ask(talk, question, picture)
    return "".join(source.assistant.answer(talk, Sampling(max_new_tokens)))


def messages_of(turns: Sequence[Turn], image_token: str) -> list[dict[str, str]]:
    """A conversation as stock code takes it, pictures written as the image token."""
    return [
        {"role": turn.role, "content": "".join(image_token if isinstance(part, ImageSlot) else part for part in turn.parts)}
        for turn in turns
    ]


def prove(source: Source, export: Path, rows: Sequence[HeldOut], *, max_new_tokens: int) -> Proof:
    """Compare the export with its source; raises `PipelineError` when they differ."""
    with tempfile.TemporaryDirectory() as folder:
        expected = ask(source, rows, Path(folder), max_new_tokens=max_new_tokens)
        _run(export, Path(folder))
        return compare(source, rows, Path(folder), expected, max_new_tokens=max_new_tokens)


def ask(source: Source, rows: Sequence[HeldOut], work: Path, *, max_new_tokens: int) -> list[torch.Tensor]:
    """Write to `work` what `pipeline.export.check` is to compute; returns the pipeline's logits [K, V] for every row."""
    expected: list[torch.Tensor] = []
    content: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        names = [f"{number}-{place}.png" for place in range(len(row.pictures))]
        for name, data in zip(names, row.pictures, strict=True):
            (work / name).write_bytes(data)
        ids, keep, logits = pipeline_logits(source, row.record.turns, exact_features(source, row.pictures))
        expected.append(logits)
        messages = messages_of(row.record.turns, source.builder.image_token)
        content.append({"messages": messages, "images": names, "ids": ids, "keep": keep})
    asked = {"image": content[0]["images"][0], "question": rows[0].question, "max_new_tokens": max_new_tokens}
    (work / "rows.json").write_text(json.dumps({"rows": content, "asked": asked}), encoding="utf-8")
    return expected


def compare(source: Source, rows: Sequence[HeldOut], work: Path, expected: Sequence[torch.Tensor], *, max_new_tokens: int) -> Proof:
    """What `pipeline.export.check` has found in `work`, against the pipeline's; raises `PipelineError` when it differs."""
    result = json.loads((work / "result.json").read_text(encoding="utf-8"))
    found = load_file(work / "logits.safetensors")
    if result["wrong"]:
        raise _refuse(f"stock Transformers reads it otherwise: {result['wrong'][0]}")
    largest = max(_difference(found[str(number)], logits) for number, logits in enumerate(expected))
    if not largest <= TOLERANCE:
        raise _refuse(f"its logits differ from the pipeline's by {largest:.1e} of the largest, allowed are {TOLERANCE:.0e}")
    if not any(result["same_ids"]):
        raise _refuse("its processor gives other token ids than the pipeline for every held-out row")
    picture = exact_features(source, rows[0].pictures[:1])[0]
    own = pipeline_answer(source, rows[0].question, picture, max_new_tokens=max_new_tokens)
    if result["answer"].strip() != own.strip():
        raise _refuse(f"to {rows[0].question!r} it answers {result['answer']!r}, the pipeline {own!r}")
    return Proof(result["class"], len(rows), largest, result["same_ids"].count(False), rows[0].question, own.strip())


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference, as a share of the largest logit where that is above 1."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1))


def _run(export: Path, work: Path) -> None:
    command = [sys.executable, "-m", "pipeline.export.check", str(export), str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise _refuse(f"stock Transformers has not come to an end of it in {LIMIT:,} seconds") from None
    if done.returncode == -signal.SIGPROF:
        raise _refuse(f"its chat template takes over {SECONDS:.0f} seconds")
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()]
        raise _refuse(f"stock Transformers cannot run it: {last[-1] if last else f'exit code {done.returncode}'}")


def _refuse(what: str) -> PipelineError:
    return PipelineError(f"the export is not the model that was trained: {what}; nothing was written", code=ARTEFACT)
