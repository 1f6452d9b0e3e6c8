"""What answering held-out questions adds to the memory that training took, and how long it takes: `python -m benchmarks.answering`.

A language model of SmolLM2-135M's shape with random weights, frozen, in bfloat16 on the CPU; questions of the embedded world about
196 patches a picture, merged 2 × 2. A process a side: a pass of training the projector, then answers to held-out questions.
`ours` is the pipeline's `answer_questions`. `views` is the same without its copy of the last token's states, so the vocabulary
projection sees a view, as Transformers' `generate` has it: its memory grows with the prompts of a pass, its time is told a
question. Writes benchmarks/results/answering.json; `--tiny` (a two-layer model) writes nothing. Takes some minutes of two cores.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any
from unittest.mock import patch

import numpy as np
import torch
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.engine import RESULTS
from benchmarks.figures import record
from benchmarks.world import LLAMAS, TINY_LLAMA
from pipeline.core import exit_on_error, quiet_libraries
from pipeline.core.devices import peak_memory_gb
from pipeline.params import load
from pipeline.records import open_dataset
from pipeline.text import PromptBuilder, RowTokenizer, Summary, TokenTable, tokenize, write_tokens
from pipeline.vlm.batches import Examples, Schedule
from pipeline.vlm.evaluation import Answering, answer_questions, find_questions
from pipeline.vlm.model import VisionLanguageModel, build_projector, freeze
from pipeline.vlm.training.loop import train

PATCHES, WIDTH, FACTOR = 196, 768, 2
TRAINED = 48  # rows: a pass
ASKED = {"ours": 256, "views": 64}  # questions by side: the other one takes too long for all
TOKENS, NEW = 4096, 8  # of a pass, in training and in answering; of an answer


class NoPictures:
    """A feature source of random patches."""

    tokens, width = PATCHES, WIDTH

    def announce(self, slots: np.ndarray) -> None:
        """Nothing to read."""

    def load(self, slots: np.ndarray) -> torch.Tensor:
        return torch.randn(len(slots), PATCHES, WIDTH, generator=torch.Generator().manual_seed(0)).half()

    def features(self, loaded: torch.Tensor) -> torch.Tensor:
        return loaded

    def stream(self, items: Iterable[tuple[Any, torch.Tensor]]) -> Iterator[tuple[Any, torch.Tensor]]:
        return iter(items)


def _tables(folder: Path, counts: list[int]) -> tuple[PromptBuilder, list[TokenTable]]:
    """Held-out questions of the embedded world, tokenised; a table a count."""
    params = load()
    builder = PromptBuilder(params.llm.model, image_token=params.llm.image_token, tokens=PATCHES // FACTOR**2)
    source = open_dataset(params.data.heldout, limit=max(counts))
    batches = tokenize(
        source.records(),
        RowTokenizer(builder, source.images, 256, "stop"),
        Summary(),
        workers=1,
        progress=lambda _: None,
    )
    write_tokens(folder / "rows.arrow", batches, builder.spec())
    return builder, [TokenTable(folder / "rows.arrow", limit=count) for count in counts]


def measure(side: str, tiny: bool) -> dict[str, float]:
    """A side's training peak, what answering adds to it, and the seconds of a question."""
    quiet_libraries()
    shape = LLAMAS["smollm2"] | (TINY_LLAMA if tiny else {})
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True)).to(torch.bfloat16)
    model = VisionLanguageModel(build_projector("mlp", WIDTH, shape["hidden_size"], "shuffle", FACTOR), llm)
    freeze(model, "projector")
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        builder, (few, asked) = _tables(Path(folder), [TRAINED, ASKED[side]])
        before = peak_memory_gb(accelerator.device)
        train(
            model,
            Examples(few, NoPictures(), builder.image_id, None, FACTOR),
            Schedule(1, TRAINED, TOKENS, 1e-4, 0.0, 0.0, 0.0, 1.0, 0),
            accelerator,
        )
        trained, start = peak_memory_gb(accelerator.device), time.perf_counter()
        examples, questions = Examples(asked, NoPictures(), builder.image_id, None, FACTOR), find_questions(asked)
        answering = Answering(NEW, ASKED[side], TOKENS)
        if side == "views":
            with patch("pipeline.vlm.model.generation._whole_states", lambda _: SimpleNamespace(remove=int)):
                answer_questions(model, examples, accelerator, builder, answering, questions)
        else:
            answer_questions(model, examples, accelerator, builder, answering, questions)
        seconds, peak = time.perf_counter() - start, peak_memory_gb(accelerator.device)
    return {
        "questions": len(questions),
        "before_training_gb": round(before, 3),
        "training_peak_gb": round(trained, 3),
        "answering_adds_gb": round(peak - trained, 3),
        "seconds_a_question": round(seconds / len(questions), 3),
    }


def main(tiny: Annotated[bool, typer.Option(help="A two-layer model: does it work? No figures are kept.")] = False) -> None:
    """Measure what answering takes."""
    exit_on_error(lambda: _main(tiny=tiny))


def _main(*, tiny: bool) -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:  # so that each peak is its own
        found = dict(zip(ASKED, pool.map(measure, ASKED, [tiny] * len(ASKED)), strict=True))
    table = Table("side", *(name.replace("_", " ") for name in found["ours"]))
    for side, figures in found.items():
        table.add_row(side, *map(str, figures.values()))
    Console(width=120).print(table)
    if not tiny:
        record(RESULTS / "answering.json", {f"answering_smollm2_{side}": figures for side, figures in found.items()})


if __name__ == "__main__":
    typer.run(main)
