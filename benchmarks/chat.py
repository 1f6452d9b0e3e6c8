"""How long a person waits for an answer: chat's own path beside a plain Transformers `generate`, the two taking turns.

    python -m benchmarks.chat [--model models/sft] [--rounds 9] [--only embedded|minimind|smollm2] [--minimind-v FOLDER] [--tiny]

Three models: the embedded one, trained (after `dvc repro`), and the shapes of MiniMind2-Small (512 wide, 8 layers) and
SmolLM2-135M behind CLIP ViT-B/16 with random weights. Each side is given a picture's file and a question and answers with 128
tokens, none of which may end it. The clock runs from the file, so that the first token has waited for decoding, the encoder and
the prompt; the rate is that of the tokens behind it. Ours and plain are held to the same prompt; MiniMind-V's own code, where a
checkout of its repository is given, takes the third turn with a prompt of its own. Writes benchmarks/results/chat.json;
`--tiny`, with two-layer models, writes nothing.
"""

import pipeline  # noqa: F401  before torch: its threads wait as chat's do

# isort: split
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel
from transformers.generation.streamers import BaseStreamer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from benchmarks.engine import RESULTS
from benchmarks.figures import record
from benchmarks.gpu.clock import spread
from benchmarks.turns import rotated
from benchmarks.world import IMAGE_TOKEN, build
from pipeline.chat.assistant import Assistant, Conversation, Pace, Sampling
from pipeline.core import PipelineError, exit_on_error, quiet_libraries, run_command
from pipeline.features import Encoder
from pipeline.text import Prompt, PromptBuilder
from pipeline.vlm.model import VisionLanguageModel, build_projector, checkpoint
from pipeline.vlm.model.language_model import load_language_model

NEW = 128  # tokens an answer
SAMPLE, QUESTION = Path("data/samples/test-7.png"), "what color is the shape?"


class Model(StrEnum):
    EMBEDDED = "embedded"
    MINIMIND = "minimind"
    SMOLLM2 = "smollm2"


class Ours(Assistant):
    """As chat has it, but an answer is as long as it may be."""

    def _produce(
        self, prompts: Sequence[Prompt], features: Sequence[torch.Tensor], sampling: Sampling, **options: Any
    ) -> np.ndarray:
        options |= {"min_new_tokens": sampling.max_new_tokens}
        return super()._produce(prompts, features, sampling, **options)

    def timed(self, picture: Path) -> Pace:
        began, pace = time.perf_counter(), Pace()
        talk = Conversation()
        self.ask(talk, QUESTION, self.look(picture))
        asked = time.perf_counter() - began
        for _ in self.answer(talk, Sampling(NEW), pace=pace):
            pass
        return Pace(pace.tokens, pace.first + asked, pace.last + asked)

    def prompt(self) -> list[int]:
        """What the model is given, as ids."""
        talk = Conversation()
        self.ask(talk, QUESTION, torch.empty(0))
        return self.builder.build_question(talk.turns).ids.tolist()


class Plain:
    """The same weights as Transformers' own documentation would have them: float32, processor, tower, chat template, `generate`."""

    def __init__(self, folder: Path, clip: Path, ours: Ours) -> None:
        self._processor = AutoImageProcessor.from_pretrained(clip, backend="pil")
        self._tower: Any = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32).eval()
        self._llm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._projector = ours.model.projector
        self._image_token, self._tokens = ours.builder.image_token, ours.encoder.tokens

    def prompt(self) -> list[int]:
        messages = [{"role": "user", "content": f"{self._image_token * self._tokens}\n{QUESTION}"}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    @torch.inference_mode()
    def timed(self, picture: Path) -> Pace:
        clock = _Clock()
        pixels = self._processor(images=Image.open(picture).convert("RGB"), return_tensors="pt")["pixel_values"]
        projected = self._projector(self._tower(pixel_values=pixels).last_hidden_state[:, 1:])
        ids = torch.tensor([self.prompt()])
        embedded = self._llm.get_input_embeddings()(ids)
        embedded[ids == self._tokenizer.convert_tokens_to_ids(self._image_token)] = projected[0]
        length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
        mask = torch.ones_like(ids)
        self._llm.generate(inputs_embeds=embedded, attention_mask=mask, do_sample=False, pad_token_id=0, streamer=clock, **length)
        return clock.pace


class MiniMindV:
    """MiniMind-V's own model, from a checkout of December 2025 and with random weights, asked as its eval_vlm.py does."""

    def __init__(self, checkout: Path, clip: Path) -> None:
        if not (checkout / "model/model_vlm.py").is_file():
            raise PipelineError("no checkout of MiniMind-V", where=str(checkout), remedy="give --minimind-v its folder")
        sys.path.insert(0, str(checkout))
        theirs: Any = importlib.import_module("model.model_vlm")
        config = theirs.VLMConfig(hidden_size=512, num_hidden_layers=8)
        self._model = theirs.MiniMindVLM(config, vision_model_path=str(clip)).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkout / "model")

    def timed(self, picture: Path) -> Pace:
        clock, model = _Clock(), self._model
        pixels = model.image2tensor(Image.open(picture).convert("RGB"), model.processor).unsqueeze(0)
        messages = [{"role": "user", "content": f"{model.params.image_special_token}\n{QUESTION}"}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        given = self._tokenizer(text, return_tensors="pt")
        length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
        ends = {"pad_token_id": self._tokenizer.pad_token_id, "eos_token_id": self._tokenizer.eos_token_id}
        prompt = {"inputs": given.input_ids, "attention_mask": given.attention_mask, "pixel_values": pixels}
        model.generate(**prompt, do_sample=False, streamer=clock, **length, **ends)
        return clock.pace


class _Clock(BaseStreamer):
    """Notes when tokens come, from when it was made."""

    def __init__(self) -> None:
        self.pace, self._began = Pace(), time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the prompt has two dimensions
            self.pace.tokens += value.numel()
            self.pace.last = time.perf_counter() - self._began
            self.pace.first = self.pace.first or self.pace.last

    def end(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Found:
    """A side's answers, without its first, which `cold` is: the libraries prepare themselves in it."""

    cold: Pace
    answers: list[Pace]

    def rates(self) -> list[float]:
        return [(answer.tokens - 1) / (answer.last - answer.first) for answer in self.answers]

    def firsts(self) -> list[float]:
        return [answer.first for answer in self.answers]

    def figures(self) -> dict[str, Any]:
        return {
            "tokens_per_second": spread(self.rates()),
            "first_token_seconds": spread(self.firsts(), 3),
            "very_first_token_seconds": round(self.cold.first, 3),
        }


def measure(folder: Path, clip: Path, picture: Path, rounds: int, minimind_v: Path | None = None) -> dict[str, Any]:
    """All sides in turn; raises `PipelineError` where ours and plain are not given the same prompt."""
    ours = Ours(folder, device="cpu")
    plain = Plain(folder, clip, ours)
    if ours.prompt() != plain.prompt():
        raise PipelineError("the two sides are given different prompts", where=str(folder), remedy="compare ids before rates")
    sides: dict[str, Callable[[Path], Pace]] = {"ours": ours.timed, "plain": plain.timed}
    if minimind_v:
        sides["minimind_v"] = MiniMindV(minimind_v, clip).timed
    cold = {name: work(picture) for name, work in sides.items()}
    answers: dict[str, list[Pace]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, work in rotated(list(sides.items()), number):
            answers[name].append(work(picture))
    if any(answer.tokens != NEW for found in answers.values() for answer in found):
        raise PipelineError("an answer has ended early", where=str(folder), remedy="a rate of it would mean something else")
    found = {name: Found(cold[name], answers[name]) for name in sides}
    ratios = {
        f"ours_over_{name}": round(median(a / b for a, b in zip(found["ours"].rates(), found[name].rates(), strict=True)), 3)
        for name in sides
        if name != "ours"
    }
    return {name: side.figures() for name, side in found.items()} | {"prompt_tokens": len(ours.prompt()), **ratios}


def make_model(folder: Path, name: str, *, tiny: bool) -> tuple[Path, Path, Path]:
    """A model of a language model's shape with random weights: its folder, its encoder's, and a picture."""
    world = build(folder, models=[name], rows=8, pictures=8, tiny=tiny)
    encoder = Encoder(str(world.clip), device=torch.device("cpu"), batch=1)
    language_model = load_language_model(str(world.llm(name)), revision="", dtype=torch.float32)
    hidden = language_model.config.hidden_size
    model = VisionLanguageModel(build_projector("linear", encoder.width, hidden), language_model)
    builder = PromptBuilder(str(world.llm(name)), image_token=IMAGE_TOKEN, tokens=encoder.tokens)
    vision = {"model": str(world.clip), "revision": "", "layer": -1, "precision": "auto", "spec": encoder.spec()}
    llm = {"model": str(world.llm(name)), "revision": "", "image_token": IMAGE_TOKEN}
    shape = {"kind": "linear", "width": encoder.width, "hidden": hidden}
    checkpoint.save(folder / "model", model, checkpoint.Manifest(vision, llm, shape, own_llm=True), builder)
    return folder / "model", world.clip, world.images / "0.jpg"


def show(console: Console, name: str, figures: dict[str, Any]) -> None:
    title = f"{name}: {figures['prompt_tokens']} tokens of prompt, {NEW} of answer"
    table = Table(title=title, box=box.SIMPLE)
    for column in ("side", "tokens/s", "min–max", "first token, s", "min–max", "the very first, s"):
        table.add_column(column, no_wrap=True)
    for side in (side for side in ("ours", "plain", "minimind_v") if side in figures):
        rate, first = figures[side]["tokens_per_second"], figures[side]["first_token_seconds"]
        told = [f"{rate['median']:.0f}", f"{rate['min']:.0f}–{rate['max']:.0f}", f"{first['median']:.3f}"]
        table.add_row(side, *told, f"{first['min']:.3f}–{first['max']:.3f}", f"{figures[side]['very_first_token_seconds']:.2f}")
    console.print(table)
    for side in (side for side in ("plain", "minimind_v") if side in figures):
        console.print(f"ours over {side}: {figures[f'ours_over_{side}']:.2f}", highlight=False)


def main(
    model: Annotated[Path, typer.Option(help="Folder of the embedded model, trained.")] = Path("models/sft"),
    rounds: Annotated[int, typer.Option(min=1, help="Answers of each side.")] = 9,
    only: Annotated[Model | None, typer.Option(help="One of the three models.")] = None,
    minimind_v: Annotated[Path | None, typer.Option(help="Checkout of MiniMind-V, commit b7cb98c: its own turn.")] = None,
    tiny: Annotated[bool, typer.Option(help="Two-layer models: does it work? No figures are kept.")] = False,
) -> None:
    """Time answers."""
    exit_on_error(lambda: _main(model, rounds, list(Model) if only is None else [only], minimind_v, tiny=tiny))


def _main(trained: Path, rounds: int, names: list[Model], minimind_v: Path | None, *, tiny: bool) -> None:
    quiet_libraries()
    console = Console()
    console.width = max(console.width, 100)  # or figures would be cut off
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            embedded = (trained, Path("data/models/clip"), SAMPLE)
            parts = embedded if name is Model.EMBEDDED else make_model(Path(folder), name, tiny=tiny)
            figures = measure(*parts, rounds, minimind_v if name is Model.MINIMIND and not tiny else None)
        show(console, name, figures)
        if not tiny:
            record(RESULTS / "chat.json", {name.value: figures})


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
