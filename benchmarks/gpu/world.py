"""Pictures, rows, encoders and features of the benchmark on a card, each made the first time a section asks for it.

    pictures/      JPEG files of 500 x 375 pixels, each different
    llm/           a tokenizer with a chat template (no weights: models are made on the device)
    ENCODER/       a vision tower with random weights, and its preprocessor
    ENCODER.arrow  one caption of 30-45 tokens a picture, for so many patches
    features-ENCODER/   what the real `extract` wrote, with what it took in extract-ENCODER.json

Everything appears whole or not at all, so a section that is stopped leaves nothing half made to the next.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from benchmarks.gpu.runner import Setting
from benchmarks.gpu.shapes import make_tower, tower_config
from benchmarks.world import IMAGE_TOKEN, PROMPTS, World, make_sentences, make_words, tokenise_rows, train_tokenizer, write_rows
from pipeline.core.files import write_json
from pipeline.features.decoding import ImageFile
from pipeline.features.distinct import distinct_images
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.extraction import extract
from pipeline.features.store.store import FeatureStore
from pipeline.records.images import ImageRoot
from pipeline.text.builder import PromptBuilder
from pipeline.text.token_table import TokenTable

SIZE = (500, 375)
SHARD_ROWS = 4096  # as in params.yaml
PICTURES = {"b16": 8192, "l14-336": 2048}  # as many as an epoch needs to last a second or two
TINY_PICTURES = 96
BATCH, TINY_BATCH = 256, 8  # pictures a call of the encoder


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """That load ahead in training."""
    return max(2, min(8, cores() // 2))


@dataclass(frozen=True, slots=True)
class Bench:
    """A run's world: `setting` says where it lies and how large it is."""

    setting: Setting

    @property
    def device(self) -> torch.device:
        return self.setting.device

    @property
    def batch(self) -> int:
        """Pictures a call of the encoder."""
        return TINY_BATCH if self.setting.tiny else BATCH

    def count(self, encoder: str) -> int:
        """Pictures, and rows, that there are for an encoder."""
        return TINY_PICTURES if self.setting.tiny else PICTURES[encoder]

    def _made(self, name: str, make: Callable[[Path], Any]) -> Path:
        """The folder of that name, filled by `make` where it is not there."""
        folder = self.setting.folder / name
        if not folder.exists():
            part = folder.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.replace(folder)  # not synced: nobody wants it after a crash
        return folder

    def pictures(self) -> ImageRoot:
        """All pictures, 0.jpg and so on."""
        return ImageRoot(self._made("pictures", lambda folder: write_pictures(folder, max(map(self.count, PICTURES)))))

    def files(self, encoder: str) -> tuple[list[ImageFile], np.ndarray]:
        """The pictures of an encoder's rows, and their hashes."""
        names = [f"{number}.jpg" for number in range(self.count(encoder))]
        return distinct_images([(self.pictures(), names)], threads=cores())

    def encoder_folder(self, name: str) -> Path:
        return self._made(name, lambda folder: save_encoder(folder, name, self.device, tiny=self.setting.tiny))

    def encoder(self, name: str, *, precision: str = "auto", batch: int = 0) -> Encoder:
        """The pipeline's own, on the device."""
        return Encoder(str(self.encoder_folder(name)), precision=precision, device=self.device, batch=batch or self.batch)

    def _llm(self) -> Path:
        return self._made(
            "llm", lambda folder: train_tokenizer(make_words(random.Random(0)), random.Random(0)).save_pretrained(folder)
        )

    def builder(self, encoder: str) -> PromptBuilder:
        """Puts conversations together for so many patches as the encoder gives."""
        return PromptBuilder(str(self._llm()), image_token=IMAGE_TOKEN, tokens=self.tokens(encoder))

    def tokens(self, encoder: str) -> int:
        config: Any = tower_config(encoder, tiny=self.setting.tiny)
        return (config.image_size // config.patch_size) ** 2

    def table(self, encoder: str, limit: int = 0) -> TokenTable:
        """The rows, the first `limit` of them: row i shows picture i."""
        world = World(self.setting.folder)
        if not world.tokens(encoder).exists():
            builder, root, rng = self.builder(encoder), self.pictures(), random.Random(1)
            sentences = make_sentences(builder.tokenizer, make_words(random.Random(0)), rng)
            count = self.count(encoder)
            spoken = [(f"{rng.choice(PROMPTS)}\n<image>", sentences[i % len(sentences)]) for i in range(count)]
            write_rows(world.records(encoder), list(range(count)), spoken)
            tokenise_rows(world, encoder, self._llm(), self.tokens(encoder), images=root)
        return TokenTable(world.tokens(encoder), limit=limit)

    def store(self, name: str) -> FeatureStore:
        """The pictures' features, extracted by the pipeline's own stage."""
        self.extracted(name)
        return FeatureStore(self.setting.folder / f"features-{name}")

    def extracted(self, name: str) -> dict[str, float]:
        """What that extraction took, as the stage itself tells it (starting its workers included)."""
        facts, out = self.setting.folder / f"extract-{name}.json", self.setting.folder / f"features-{name}"
        if not facts.exists():
            files, hashes = self.files(name)
            shards = self.setting.folder / "shards" / name
            shutil.rmtree(shards, ignore_errors=True)
            encoder = self.encoder(name)
            warm = np.zeros((encoder.batch, 3, *encoder.preprocess.size()), np.uint8)
            encoder.relative_error()  # once a run, as loading is
            encoder.encode_rows(torch.from_numpy(warm), ["warm"] * len(warm))
            done = extract(files, hashes, encoder, stores=[shards], out=out, shard_rows=SHARD_ROWS, workers=cores())
            rate = done.encoded / done.seconds
            told = {"images": done.encoded, "images_per_second": rate, "waiting_share": done.waited / done.seconds}
            write_json(facts, told | {"decode_ms": 1000 * done.decoding / done.encoded, "bytes": done.bytes})
        return json.loads(facts.read_text(encoding="utf-8"))


def save_encoder(folder: Path, name: str, device: torch.device, *, tiny: bool) -> None:
    """A tower with random weights and CLIP's preprocessor for its pictures' size."""
    config: Any = tower_config(name, tiny=tiny)
    make_tower(config, device, torch.float32).save_pretrained(folder)
    side = config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(folder)


def write_pictures(folder: Path, count: int) -> None:
    """JPEG files as hard to decode as photographs, written by all cores."""
    with ProcessPoolExecutor(cores(), mp_context=get_context("fork")) as pool:
        for _ in pool.map(_write_picture, [folder] * count, range(count), chunksize=16):
            pass


def _write_picture(folder: Path, number: int) -> None:
    """Soft colours with grain."""
    rng = np.random.default_rng(number)
    soft = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    grain = rng.integers(-12, 13, (SIZE[1], SIZE[0], 1), dtype=np.int16)
    pixels = np.clip(np.asarray(soft, np.int16) + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)
