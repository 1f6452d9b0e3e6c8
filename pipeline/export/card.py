"""README.md of an export: what the model is, how to run it, what it was trained on and how well it does.

Reads dvc.lock, which says what made a folder with which parameters, the metrics files it names, and git.
"""

import json
import os
import subprocess
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline import __version__
from pipeline.core import PipelineError
from pipeline.export.proof import Proof
from pipeline.export.source import Source
from pipeline.params import read_yaml

RUN = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "."  # this folder, or its hub id
model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as in training; torchvision resizes slightly otherwise
question = [{"type": "image", "path": "photo.jpg"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""
RUN_GGUF = r"""\
llama-mtmd-cli -m model.gguf --mmproj mmproj.gguf --image photo.png -p $'<__media__>\nWhat is this?' --jinja --temp 0"""
RUN_NOTE = "Give pictures as upright RGB: in training, transparent ones were laid on white."
RUN_NOTE_GGUF = (
    "Start the question with a line break: it stands between picture and question in training. Square pictures of the "
    "encoder's size come out as in training; others llama.cpp resizes in its own way and pads to a square."
)
HEADER = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}


def commit(root: Path = Path()) -> str:
    """The git commit of the project, marked when files differ from it; empty outside a repository."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def lineage(folder: Path, root: Path = Path()) -> dict[str, dict[str, Any]]:
    """The stages that made `folder`, as dvc.lock has them, first one first; empty when DVC did not make it."""
    try:
        stages = read_yaml(root / "dvc.lock")["stages"]
    except (PipelineError, KeyError):
        return {}
    folder = Path(os.path.relpath(folder, root))  # as dvc.lock writes it
    makers = {Path(out["path"]): name for name, stage in stages.items() for out in stage.get("outs", [])}
    needed: list[str] = [makers[folder]] if folder in makers else []
    for name in needed:  # grows on the way
        for dep in stages[name].get("deps", []):
            maker = makers.get(Path(dep["path"]))
            if maker and maker not in needed:
                needed.append(maker)
    return {name: stages[name] for name in reversed(needed)}


def write_card(source: Source, folder: Path, proof: Proof, *, parameters: int, dtype: str, gguf: bool, root: Path = Path()) -> None:
    """Write README.md."""
    vision, llm = source.manifest.vision, source.manifest.llm
    base = [name for name in (vision["model"], llm["model"]) if not Path(name).exists()]  # hub ids; a folder's name says nothing
    header = {**HEADER, **({"base_model": base} if base else {}), **({"tags": ["gguf"]} if gguf else {})}
    sections = [
        f"---\n{_yaml(header)}---\n# {source.folder.resolve().name}",
        f"A vision-language model made with Glance {__version__}: a frozen vision encoder, a `{source.kind}` projector and a "
        f"language model, {parameters:,} parameters in {dtype}.",
        _parts(source),
        f"## Run it\n\n```{'' if gguf else 'python'}\n{RUN_GGUF if gguf else RUN}\n```",
        RUN_NOTE_GGUF if gguf else RUN_NOTE,
        f"## Proof\n\n{_proof(proof, gguf=gguf)}",
        *_training(lineage(source.folder, root), root),
        f"Code: git commit `{commit(root) or 'unknown'}`. Licences are those of the models and data named here.",
    ]
    (folder / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _parts(source: Source) -> str:
    vision, llm, encoder = source.manifest.vision, source.manifest.llm, source.encoder
    trained = "trained with the projector" if source.manifest.own_llm else "as it was"
    rows = [
        ["vision encoder", _named(vision), f"{encoder.tokens} patches × {encoder.width}, hidden state {vision['layer']}"],
        ["projector", f"`{source.kind}`", f"{encoder.width} → {source.model.hidden_size}"],
        ["language model", _named(llm), trained],
    ]
    return _table(["part", "made from", ""], rows)


def _proof(proof: Proof, *, gguf: bool) -> str:
    text = (
        f"Before this folder was written, stock Transformers read the exported model in a process of its own. On {proof.rows} "
        f"held-out conversations its logits at every answer token were at most {proof.largest:.1e} of the largest logit away "
        f"from the training code's. To “{proof.question}” both answered “{proof.answer}”."
    )
    return f"{text} The tensors of these GGUF files were read back and are the same." if gguf else text


def _training(made_by: dict[str, dict[str, Any]], root: Path) -> list[str]:
    """Figures and parameters of the stages, from dvc.lock and the metrics files it names."""
    rows: list[list[str]] = []
    params: dict[str, Any] = {}
    for name, stage in made_by.items():
        params |= stage.get("params", {}).get("params.yaml", {})
        for out in stage.get("outs", []):
            path = root / out["path"]
            if path.parent.name == "metrics" and path.is_file():
                figures = json.loads(path.read_text(encoding="utf-8"))
                if "accuracy" in figures:
                    rows.append([name, *(_figure(figures.get(key)) for key in ("loss", "accuracy", "accuracy_blind", "questions"))])
    params = {key: value for key, value in params.items() if key.split(".")[0] == key or key.split(".")[0] not in params}
    if not params:
        return ["## Training\n\nNot made by a DVC stage, so nothing is recorded of how it was trained."]
    header = ["stage", "held-out loss", "exact answers", "blind control (images zeroed)", "held-out questions"]
    measured = f"## Training and figures\n\n{_table(header, rows)}" if rows else "## Training"
    return [measured, f"Parameters of the stages, data sets among them:\n\n```yaml\n{_yaml(params)}```"]


def _named(part: dict[str, Any]) -> str:
    return f"`{part['model']}`" + (f" at `{part['revision']}`" if part["revision"] else "")


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else f"{value:.4f}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


def _yaml(content: dict[str, Any]) -> str:
    text, yaml = StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(content, text)
    return text.getvalue()
