"""What to do after a run, in commands that fit its data: a held-out picture with its question, another learning rate."""

import shlex
import sys
from pathlib import Path

from pipeline.core import PipelineError
from pipeline.params import Params, load
from pipeline.report.answers_file import AnswersFile

# some pictures of the demo's zip lie apart, test/7.png as test-7.png
DEMO, SAMPLES = "data/easyvqa/images.zip", Path("data/samples")
ANSWERS, LOOKED_AT = Path("results/sft/predictions.parquet"), 1000  # rows of it


def hints(params: Path = Path("params.yaml")) -> list[str]:
    """Lines of `command  what it does`; none where params.yaml cannot be read."""
    try:
        found = load(params)
    except PipelineError:
        return []
    activate = Path(".venv/bin/activate")
    commands = [(f"source {activate}", "for the commands below")] if activate.exists() and not _active(activate) else []
    picture, question, what = _heldout(found) or ("PICTURE", "Describe the picture.", "an answer of your model")
    commands += [
        (f"glance chat {shlex.quote(picture)} {shlex.quote(question)}", what),
        ("glance report --html report.html", "every picture, answer and curve worth a look"),
        (f"dvc exp run -S pretrain.lr={2 * found.pretrain.lr:g}", "trains again; nothing is encoded or tokenised again"),
    ]
    width = max(len(command) for command, _ in commands)
    return [f"{command:<{width}}  {what}" for command, what in commands]


def _active(activate: Path) -> bool:
    return Path(sys.prefix).resolve() == activate.parent.parent.resolve()


def _heldout(params: Params) -> tuple[str, str, str] | None:
    """A picture in a folder that the last run was asked about, with the question and what it is; None where there is none."""
    images = params.data.heldout.images
    try:
        with ANSWERS.open("rb") as file:
            batch = next(AnswersFile(file, where=str(ANSWERS)).batches(["images", "question"]))
            rows = batch.slice(0, LOOKED_AT).to_pylist()
    except (OSError, PipelineError, StopIteration):
        return None
    for row in rows:
        for name in row["images"][:1]:
            path = SAMPLES / name.replace("/", "-") if images == DEMO else Path(images) / name
            if path.is_file() and len(row["question"]) <= 80 and row["question"].isprintable():
                return str(path), row["question"], "a held-out picture"
    return None
