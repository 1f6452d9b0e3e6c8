"""How the answers to the same few held-out pictures came to be: samples.json of a stage as cards, a line a measurement."""

from typing import Any

import numpy as np

from pipeline.core import ARTEFACT, PipelineError
from pipeline.params import Dataset
from pipeline.report.experiment import Experiment
from pipeline.report.gallery import draw, shorten

LINES = 8  # measurements of a card that are shown, the first and the last among them


def sample_cards(run: Experiment, stage: str, dataset: Dataset | None) -> list[dict[str, Any]]:
    """A card a question, in the form of the gallery's; none where nothing was measured on the way.

    Raises `PipelineError` for what no stage has written.
    """
    path = f"results/{stage}/samples.json"
    found = run.json(path)
    if not found:
        return []
    try:
        measured = found["measured"]
        shown = [measured[number] for number in sorted(set(np.linspace(0, len(measured) - 1, LINES).astype(int).tolist()))]
        cards = [
            {
                "names": [str(name) for name in asked["images"]],
                "question": shorten(str(asked["question"])),
                "reference": shorten(str(asked["reference"])),
                "lines": [{"step": int(row["step"]) + 1, "text": shorten(str(row["answers"][number]))} for row in shown],
                "pictures": [],
            }
            for number, asked in enumerate(found["questions"])
        ]
    except (KeyError, IndexError, TypeError, ValueError):
        where = f"{path} of {run.name}"
        raise PipelineError(
            "not a stage's sample answers", where=where, remedy="dvc checkout, else dvc repro", code=ARTEFACT
        ) from None
    draw(cards, dataset)
    return cards
