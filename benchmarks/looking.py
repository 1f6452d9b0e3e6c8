"""How much of what an answer's word looked at lies on the shape: `python -m benchmarks.looking`, after `dvc repro`.

Over held-out pictures of the embedded world, each a shape on a plain ground, with the trained model and with controls that have
not learnt to look: its projector re-drawn, its encoder re-drawn. The same words are looked back at by all. Writes the figures to
results/looking.json and the table in docs/evaluation.md. Takes two minutes of one core.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from transformers import PreTrainedModel

from benchmarks.figures import record
from pipeline.chat.assistant import Assistant, Sampling
from pipeline.core import PipelineError, exit_on_error, quiet_libraries, run_command
from pipeline.core.grid import mean_of_blocks
from pipeline.records import ImageSlot, Turn
from pipeline.saliency import METHODS, look_back
from pipeline.vlm.model import VisionLanguageModel, build_projector

DATA, RESULTS, PAGE = Path("data/easyvqa"), Path("benchmarks/results/looking.json"), Path("docs/evaluation.md")
ASKED = {"colour": ("what color is the shape?", "{colour}."), "shape": ("what shape is in the image?", "A {shape}.")}
APART = 16  # levels of a channel from the ground, from which on a pixel belongs to the shape
BEGIN, END = "<!-- figures of benchmarks.looking -->", "<!-- end -->"


@dataclass(frozen=True, slots=True)
class Example:
    """A picture: its pixels [3, side, side], and whether each patch [grid, grid] has a part of the shape."""

    pixels: torch.Tensor
    features: torch.Tensor
    inside: np.ndarray
    words: dict[str, str]


def examples(assistant: Assistant, count: int) -> Iterator[Example]:
    """The first pictures of the held-out captions."""
    encoder = assistant.encoder
    lines = (DATA / "captions_heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    with zipfile.ZipFile(DATA / "images.zip") as archive:
        for line in lines:
            row = json.loads(line)
            [name], caption = row["images"], row["messages"][1]["content"]
            _, colour, shape = caption.rstrip(".").split()
            data = archive.read(name)
            pixels = torch.from_numpy(encoder.preprocess(data, where=name))
            side = encoder.side // encoder.tower.config.patch_size
            colours, counts = np.unique(pixels.flatten(1).numpy(), axis=1, return_counts=True)
            ground = torch.from_numpy(colours[:, counts.argmax()])[:, None, None]
            apart = (pixels.int() - ground.int()).abs().amax(0) > APART
            inside = apart.unflatten(0, (side, -1)).unflatten(2, (side, -1)).any(3).any(1).numpy()
            yield Example(
                pixels,
                encoder.encode_files([data], [name])[0],
                inside,
                {"colour": colour.capitalize(), "shape": shape},
            )


def share_on_shape(
    assistant: Assistant, model: VisionLanguageModel, tower: PreTrainedModel, shown: list[Example]
) -> dict[str, dict[str, float]]:
    """Method -> mean share of the answer word's heat that lies on the shape's patches, by question."""
    found: dict[str, dict[str, list[float]]] = {method: {kind: [] for kind in ASKED} for method in METHODS}
    for example in shown:
        for kind, (question, answer) in ASKED.items():
            said = answer.format(colour=example.words["colour"], shape=example.words["shape"])
            turns = [Turn("user", (ImageSlot(0), f"\n{question}")), Turn("assistant", (said,))]
            pixels = example.pixels[None]
            seen = look_back(model, assistant.encoder, assistant.builder, turns, pixels, list(METHODS), tower=tower)
            word = seen.words.index(example.words[kind])
            for maps in seen.maps:
                found[maps.method][kind].append(float(maps.heat[word, 0][example.inside].sum()))
    return {method: {kind: round(float(np.mean(shares)), 3) for kind, shares in of.items()} for method, of in found.items()}


def right_without_shape(assistant: Assistant, shown: list[Example]) -> dict[str, float]:
    """Share of answers that are right though the features of every patch of the shape are those of the ground, on average."""
    found = {}
    for kind, (question, _) in ASKED.items():
        asked = []
        for example in shown:
            stored = torch.from_numpy(example.inside)[None, :, :, None].float().flatten(1, 2)
            hidden = mean_of_blocks(stored, assistant.encoder.pool)[0, :, 0] > 0
            features = example.features.clone()
            features[hidden] = example.features[~hidden].float().mean(0).to(features.dtype)
            asked.append((question, [features]))
        answers = assistant.answer_all(asked, Sampling(8))
        right = [example.words[kind] in str(answer) for example, answer in zip(shown, answers, strict=True)]
        found[kind] = round(float(np.mean(right)), 3)
    return found


def redrawn(assistant: Assistant) -> tuple[VisionLanguageModel, PreTrainedModel]:
    """The model with another projector, and the encoder with other weights."""
    torch.manual_seed(0)
    old: Any = assistant.model.projector
    merge = getattr(old, "merge", None)
    kind, factor = ("none", 1) if merge is None else (type(merge).__name__.lower(), merge.factor)
    projector = build_projector("mlp", assistant.encoder.width, assistant.model.hidden_size, kind, factor)
    tower: Any = type(assistant.exact_tower)(assistant.exact_tower.config).eval().requires_grad_(False)
    return VisionLanguageModel(projector, assistant.model.language_model).eval(), tower


def table(figures: dict[str, Any]) -> str:
    """What docs/evaluation.md shows."""
    lines = ["| the answer's word | trained | projector re-drawn | encoder re-drawn |", "|---|---|---|---|"]
    for method in METHODS:
        for kind in ASKED:
            cells = [f"{figures[model][method][kind]:.1%}" for model in ("trained", "projector", "encoder")]
            lines.append(f"| `{method}`, {kind} | {' | '.join(cells)} |")
    area, without = figures["area"], figures["right_without_shape"]
    return "\n".join(
        [
            *lines,
            "",
            f"Mean of {figures['pictures']} held-out pictures: the share of a word's heat that lies on the shape's patches,",
            f"which are {area['mean']:.1%} of all ({area['least']:.0%} to {area['most']:.0%}). When the features of those patches",
            f"are replaced by the mean of all others, the trained model still names the colour in {without['colour']:.1%} of the",
            f"pictures and the shape in {without['shape']:.1%}.",
        ]
    )


def write(figures: dict[str, Any]) -> None:
    record(RESULTS, figures)
    text = PAGE.read_text(encoding="utf-8")
    if BEGIN not in text:
        raise PipelineError("has no place for the figures", where=str(PAGE), remedy=f"put {BEGIN} and {END} there")
    before, rest = text.split(BEGIN, 1)
    PAGE.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{rest.split(END, 1)[1]}", encoding="utf-8")


def measure(model: Path = Path("models/sft"), pictures: int = 200, show: bool = False) -> None:
    """Measure, and write what was found; --show only prints it."""
    exit_on_error(lambda: _measure(model, pictures, show=show))


def _measure(folder: Path, count: int, *, show: bool) -> None:
    quiet_libraries()
    assistant = Assistant(folder, device="cpu")
    shown = list(examples(assistant, count))
    areas = np.array([example.inside.mean() for example in shown])
    projector, tower = redrawn(assistant)
    figures: dict[str, Any] = {
        "pictures": len(shown),
        "area": {"mean": round(float(areas.mean()), 3), "least": float(areas.min()), "most": float(areas.max())},
        "trained": share_on_shape(assistant, assistant.model, assistant.exact_tower, shown),
        "projector": share_on_shape(assistant, projector, assistant.exact_tower, shown),
        "encoder": share_on_shape(assistant, assistant.model, tower, shown),
        "right_without_shape": right_without_shape(assistant, shown),
    }
    print(table(figures) if show else f"{RESULTS}, {PAGE}")
    if not show:
        write(figures)


if __name__ == "__main__":
    run_command(lambda: typer.run(measure))
