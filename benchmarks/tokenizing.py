"""The two sides of benchmarks.tokenize, each with the same rows, and the speed of hashing pictures."""

import os
import random
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.talk import rows
from pipeline.records.formats import BadRow, Digests, GoodImages, Source, SourceSpec
from pipeline.records.images import ImageRoot, digest
from pipeline.records.record import ImageSlot, Record, Turn
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import write_tokens
from pipeline.text.tokenization import RowFilter, RowTokenizer, Summary, tokenize

PATCHES = 64  # P
BATCH = 1024  # texts a call of the library: what it is fastest with here
PICTURES, PICTURE_BYTES = 2_000, 60_000
_TURNS = (Turn("user", ("Why?",)), Turn("assistant", ("So.",)))


def alone(cores: int, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns, done in a fresh process that has so many cores."""
    with ProcessPoolExecutor(1, get_context("spawn"), _limit, (cores,)) as pool:
        return pool.submit(work, *arguments).result()


def _limit(cores: int) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def open_rows(file: Path, model: str) -> tuple[Source, PromptBuilder, RowTokenizer]:
    """The rows of a file, and what tokenises them: nothing is too long, and the pictures are known to decode."""
    images, good = file.parent / "images", file.parent / "good.npy"
    if not good.exists():
        hashes = [np.frombuffer(digest(path.read_bytes()), np.uint8) for path in images.iterdir()]
        np.save(good, GoodImages.table(np.stack(hashes)))
    source = Source(SourceSpec(str(file), images=str(images)))
    builder = PromptBuilder(model, image_token="<image>", tokens=PATCHES)
    return source, builder, RowTokenizer(builder, source.images, 100_000, "cut", RowFilter(good))


def measure_speed(file: Path, model: str, cores: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """Rows a second of every round of every side, and the library's tokens a row.

    Raises AssertionError when the sides' ids are not of the same text.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as the stage has it: as many threads of the library as there are cores
    source, builder, tokenizer = open_rows(file, model)
    texts = [_render(builder, row) for row in source.records()]
    workers = cores + 1 if cores > 1 else 1  # one more, since one core would wait when the reader does
    table, spec = file.with_suffix(".arrow"), builder.spec()
    tail = len(builder.build(_TURNS, trim=False).ids) - len(builder.build(_TURNS).ids)

    def ours() -> int:
        """Tokens of text: those of images are not, nor the template's tail that the library encodes and we leave out."""
        total = Summary()
        write_tokens(table, tokenize(source.records(), tokenizer, total, workers=workers, progress=int), spec)
        return total.tokens - total.images * (PATCHES - 1) + total.rows * tail

    def library() -> int:
        """Rendered text -> ids in Python, without the offsets that its other call computes."""
        count, encode = 0, builder.tokenizer.backend_tokenizer.encode_batch_fast
        for start in range(0, len(texts), BATCH):
            count += sum(len(part.ids) for part in encode(texts[start : start + BATCH], add_special_tokens=False))
        return count

    def transformers() -> int:
        """As the documentation calls it."""
        count = 0
        for start in range(0, len(texts), BATCH):
            count += sum(map(len, builder.tokenizer(texts[start : start + BATCH], add_special_tokens=False)["input_ids"]))
        return count

    sides: dict[str, Callable[[], int]] = {"ours": ours, "library": library, "transformers": transformers}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    counts = set()
    for turn in range(rounds + 1):  # the first warms up
        for name in random.sample(list(sides), len(sides)):
            began = time.perf_counter()
            counts.add(sides[name]())
            if turn:
                rates[name].append(len(texts) / (time.perf_counter() - began))
    assert len(counts) == 1, f"the sides' tokens differ: {sorted(counts)}"
    return rates, counts.pop() / len(texts)


def _render(builder: PromptBuilder, row: Record | BadRow) -> str:
    assert isinstance(row, Record)
    messages = [
        {"role": turn.role, "content": "".join("<image>" if isinstance(part, ImageSlot) else part for part in turn.parts)}
        for turn in row.turns
    ]
    return str(builder.tokenizer.apply_chat_template(messages, tokenize=False))


def train_tokenizer(folder: Path) -> None:
    """A tokenizer with a vocabulary of everyday size: almost every word of these rows is one token, as in large models."""
    template = AutoTokenizer.from_pretrained("data/models/llm").chat_template
    tokenizer = Library(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = (message["content"] for row in rows(10_000, ["a"], seed=1) for message in row["messages"])
    tokenizer.train_from_iterator(words, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, eos_token="<|im_end|>").save_pretrained(folder)


def hash_pictures(root: Path, rounds: int) -> dict[str, list[float]]:
    """Images a second, read and hashed, from a folder and from an uncompressed zip; files of 60 KB that are in memory."""
    (root / "folder").mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(PICTURES)]
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name in names:
            data = os.urandom(PICTURE_BYTES)
            (root / "folder" / name).write_bytes(data)
            archive.writestr(name, data)
    rates: dict[str, list[float]] = {"folder": [], "images.zip": []}
    for _ in range(rounds):
        for kind, found in rates.items():
            digests = Digests(ImageRoot(root / kind))
            began = time.perf_counter()
            for name in names:
                digests(name)
            found.append(len(names) / (time.perf_counter() - began))
    return rates
