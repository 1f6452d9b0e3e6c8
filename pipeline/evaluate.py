"""What a model has learnt, on rows it never saw: loss, exact-match accuracy of its greedy answers, and both kept honest
by a blind control (the same questions, image features zeroed).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from pipeline.ahead import run_ahead
from pipeline.batches import Batch, collate, split_by_tokens
from pipeline.generation import generate
from pipeline.model import VisionLanguageModel
from pipeline.sharing import Sharing, alone
from pipeline.sources import FeatureSource
from pipeline.text import PromptBuilder
from pipeline.tokens import TokenTable


@dataclass(frozen=True, slots=True)
class Score:
    """`correct` of `questions` answered word for word."""

    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


@torch.no_grad()  # not inference mode: a model that goes on training afterwards must not keep a tensor of it
def heldout_loss(
    model: VisionLanguageModel,
    table: TokenTable,
    source: FeatureSource,
    accelerator: Accelerator,
    *,
    image_id: int,
    micro_tokens: int,
    sharing: Sharing | None = None,
    even: bool = False,
) -> float:
    """Mean cross-entropy a supervised token over all rows; several processes (accelerate) divide them.

    `even`: all make as many forward passes, as a divided model needs; those of a process with less to do do not count.
    """
    model.eval()
    sharing, rank, ranks = sharing or alone(table.lengths), accelerator.process_index, accelerator.num_processes
    rows = np.arange(len(table))
    parts = split_by_tokens(rows, sharing, micro_tokens, rank=rank, ranks=ranks)
    counted = len(parts)
    if even:
        most = max(len(split_by_tokens(rows, sharing, micro_tokens, rank=number, ranks=ranks)) for number in range(ranks))
        parts += [[rows[:1]]] * (most - counted)

    def load(units: list[np.ndarray]) -> tuple[Batch, Any]:
        batch = collate(table, units, sharing=sharing, image_id=image_id, tokens=source.tokens)
        return batch, source.load(batch.slots)

    total = 0.0
    hidden = not accelerator.is_main_process
    loaded = source.stream(made for _, made in run_ahead(parts, load))
    bar = tqdm(loaded, total=len(parts), desc="held-out loss", unit="batch", mininterval=0.5, disable=hidden)
    for number, (batch, features) in enumerate(bar):
        with accelerator.autocast():
            loss, _ = model(batch.to(accelerator.device), features.to(accelerator.device))
        total += float(loss) if number < counted else 0.0
    summed = accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=accelerator.device), "sum")
    return float(summed) / int(table.supervised.sum())


@torch.inference_mode()
def answer_accuracy(
    model: VisionLanguageModel,
    table: TokenTable,
    source: FeatureSource,
    accelerator: Accelerator,
    builder: PromptBuilder,
    *,
    max_new_tokens: int,
    batch_size: int,
    blind: bool,
    name: str,
) -> tuple[Score, list[str]]:
    """Greedy answers to each row's last question, compared as text with the row's own; returns the score and all answers.

    Rows with the same prompt and the same images have the same answer, so each is generated once. Zeroed images are all
    the same image, which is why the blind control takes a fraction of the time.
    """
    model.eval()
    rows = [table.row(number) for number in range(len(table))]
    asked = [row.ids[: row.spans[-1][0]] for row in rows]
    same = _same_prompts(asked, [row.slots for row in rows], None if blind else table.image_hashes())
    same.sort(key=lambda group: -len(asked[group[0]]))  # like lengths together: little padding
    parts = [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
    parts = parts[accelerator.process_index :: accelerator.num_processes]
    answers: dict[int, str] = {}

    def load(part: list[list[int]]) -> Any:
        return source.load(np.concatenate([np.array(rows[group[0]].slots, np.int64) for group in part]))

    for part, features in tqdm(
        source.stream(run_ahead(parts, load)),
        total=len(parts),
        desc=name,
        unit="batch",
        mininterval=0.5,
        disable=not accelerator.is_main_process,
    ):
        firsts = [group[0] for group in part]
        with accelerator.autocast():
            produced = generate(
                model,
                builder,
                [asked[n] for n in firsts],
                [rows[n].image_start for n in firsts],
                features,
                max_new_tokens=max_new_tokens,
                device=accelerator.device,
            )
        for group, ids in zip(part, produced, strict=True):
            text = builder.decode(ids)
            for number in group:
                answers[number] = text
    expected = [builder.decode(row.ids[row.spans[-1][0] : row.spans[-1][1]]) for row in rows]
    everyone = gather_object([answers]) if accelerator.num_processes > 1 else [answers]
    found = {number: text for part in everyone for number, text in part.items()}
    given = [found[number] for number in range(len(rows))]
    return Score(sum(a.strip() == e.strip() for a, e in zip(given, expected, strict=True)), len(rows)), given


def _same_prompts(asked: list[np.ndarray], slots: list[range], hashes: np.ndarray | None) -> list[list[int]]:
    """Row numbers grouped by equal prompt and equal images (`hashes` None: images do not tell rows apart)."""
    groups: dict[tuple[bytes, bytes], list[int]] = {}
    for number, (ids, shown) in enumerate(zip(asked, slots, strict=True)):
        images = b"" if hashes is None else hashes[shown.start : shown.stop].tobytes()
        groups.setdefault((ids.tobytes(), images), []).append(number)
    return list(groups.values())
