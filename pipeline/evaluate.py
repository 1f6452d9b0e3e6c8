"""What a model has learnt, on rows it never saw: loss, exact-match accuracy of its greedy answers, and both kept honest
by a blind control (the same questions, image features zeroed).
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from pipeline.batches import collate, split_by_tokens
from pipeline.model import VisionLanguageModel, splice
from pipeline.sources import FeatureSource
from pipeline.text import PromptBuilder
from pipeline.tokens import TokenTable
from pipeline.training import run_ahead


@dataclass(frozen=True, slots=True)
class Score:
    """`correct` of `questions` answered word for word."""

    correct: int
    questions: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.questions


@torch.inference_mode()
def heldout_loss(
    model: VisionLanguageModel, table: TokenTable, source: FeatureSource, accelerator: Accelerator, *, image_id: int, micro_tokens: int
) -> float:
    """Mean cross-entropy a supervised token over all rows."""
    model.eval()
    parts = split_by_tokens(np.arange(len(table)), table.lengths, micro_tokens)

    def load(rows: np.ndarray):
        batch = collate(table, rows, image_id=image_id, tokens=source.tokens)
        return batch, source.load(batch.slots)

    total = 0.0
    for _, (batch, loaded) in tqdm(run_ahead(parts, load), total=len(parts), desc="held-out loss", unit="batch", mininterval=0.5):
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            loss, _ = model(batch, source.features(loaded).to(accelerator.device))
        total += float(loss)
    return total / int(table.supervised.sum())


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
    hashes = table.image_hashes()
    prompts: dict[tuple[bytes, bytes], list[int]] = {}
    for number, row in enumerate(rows):
        prompt = row.ids[: row.spans[-1][0]].tobytes()
        shown = b"" if blind else hashes[row.slots.start : row.slots.stop].tobytes()
        prompts.setdefault((prompt, shown), []).append(number)
    firsts = sorted((same[0] for same in prompts.values()), key=lambda number: -rows[number].spans[-1][0])
    answers = [""] * len(rows)
    groups = list(prompts.values())
    same_as = {group[0]: group for group in groups}
    parts = [firsts[start : start + batch_size] for start in range(0, len(firsts), batch_size)]

    def load(part: list[int]):
        return source.load(np.concatenate([np.arange(rows[n].slots.start, rows[n].slots.stop) for n in part]).astype(np.int64))

    for part, loaded in tqdm(run_ahead(parts, load), total=len(parts), desc=name, unit="batch", mininterval=0.5):
        features = source.features(loaded).to(accelerator.device)
        texts = generate(model, [rows[n].ids[: rows[n].spans[-1][0]] for n in part], [rows[n].image_start for n in part], features,
                         accelerator, builder, max_new_tokens=max_new_tokens)
        for number, text in zip(part, texts, strict=True):
            for row in same_as[number]:
                answers[row] = text
    expected = [builder.decode(row.ids[row.spans[-1][0] : row.spans[-1][1]]) for row in rows]
    return Score(sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)), len(rows)), answers


def generate(
    model: VisionLanguageModel,
    prompts: list[np.ndarray],
    image_starts: list[np.ndarray],
    features: torch.Tensor,
    accelerator: Accelerator,
    builder: PromptBuilder,
    *,
    max_new_tokens: int,
    **options: object,
) -> list[str]:
    """Answers to prompts (ids [T] each, left-padded together) whose images' features [S, P, Dv] follow in order."""
    width = max(len(ids) for ids in prompts)
    padded = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros((len(prompts), width), np.int64)
    for i, ids in enumerate(prompts):
        padded[i, width - len(ids) :] = ids
        mask[i, width - len(ids) :] = 1
    device = accelerator.device
    row = np.repeat(np.arange(len(prompts)), [len(starts) for starts in image_starts])
    start = np.concatenate([starts + width - len(ids) for ids, starts in zip(prompts, image_starts, strict=True)]).astype(np.int64)
    attention_mask = torch.from_numpy(mask).to(device)
    with accelerator.autocast():
        embeddings = model.language_model.get_input_embeddings()(torch.from_numpy(padded).to(device))
        projected = model.projector(features.to(device, model.projector[0].weight.dtype))
        embeddings = splice(embeddings, projected, torch.from_numpy(row).to(device), torch.from_numpy(start).to(device))
        produced = model.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=builder.end_id,
            pad_token_id=builder.end_id,
            suppress_tokens=[builder.image_id],
            **({"do_sample": False, "temperature": None, "top_p": None, "top_k": None} | options),
        )
    return [builder.decode(ids) for ids in produced.cpu().numpy()]
