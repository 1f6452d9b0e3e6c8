"""A made-up project of finished runs: figures, answers, curves and pictures as the stages write them, nothing trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.params.reading import override, read_yaml
from pipeline.vlm.evaluation.choosing import choose_metrics
from pipeline.vlm.evaluation.predictions import TEXTS, make_table, writing_tables
from pipeline.vlm.evaluation.summary import summarise

ROOT = Path(__file__).parents[2]
WORDS = ("Red.", "Blue.", "Yes.", "No.")
ASKED = ("What color is it?", "What color is it?", "Is there a circle?", "Is there a circle?")


class Results:
    """The folder the test runs in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copy(ROOT / "params.yaml", folder)
        shutil.copy(ROOT / "dvc.yaml", folder)
        self.link_library()
        (folder / "data/pictures").mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (40, 30), (30 * number, 90, 200)).save(folder / f"data/pictures/{number}.png")
        (folder / "data/rows.jsonl").write_text(
            json.dumps(
                {"messages": [{"role": "user", "content": "<image>x"}, {"role": "assistant", "content": "y"}], "images": ["0.png"]}
            )
            + "\n"
        )
        self.set("data.heldout.records=data/rows.jsonl", "data.heldout.images=data/pictures")

    def link_library(self) -> None:
        """What draws the charts, where a project has it."""
        (self.folder / ".dvc/plots").mkdir(parents=True)
        (self.folder / ".dvc/plots/offline.html").symlink_to(ROOT / ".dvc/plots/offline.html")

    def set(self, *assignments: str) -> None:
        from ruamel.yaml import YAML

        content = read_yaml(self.folder / "params.yaml")
        override(content, list(assignments))
        YAML().dump(content, self.folder / "params.yaml")

    def rows(self, count: int = 120, *, wrong_every: int = 5) -> list[dict[str, Any]]:
        """Questions about eight pictures, one in so many answered wrongly."""
        made = []
        for number in range(count):
            reference, wrong = WORDS[number % 4], number % wrong_every == 0
            made.append(
                {
                    "where": f"data/rows.jsonl:{number + 1}",
                    "source": "data/rows.jsonl",
                    "turn": 0,
                    "images": [f"{number % 8}.png"],
                    "question": ASKED[number % 4],
                    "reference": reference,
                    "answer": WORDS[(number + 1) % 4] if wrong else reference,
                    "blind": WORDS[(number // 4) % 4],
                    "log_likelihood": [-3.0 - number / count if wrong else -0.01, -0.001],
                }
            )
        return made

    def write(self, stage: str, rows: list[dict[str, Any]], *, heldout: bool = False, **figures: Any) -> None:
        """What a stage leaves behind it, by the code that the stages use."""
        table, folder = self.write_answers(stage, rows), self.folder / "results" / stage
        chosen, why = choose_metrics("auto", table["question"].to_pylist(), table["reference"].to_pylist())
        (folder / "scores.json").write_text(json.dumps(summarise(folder / "predictions.parquet", chosen, why)))
        steps = np.arange(300)
        lines = [f"{step},0,{3 * 0.98**step + 0.01},{1e-3 * (1 - step / 300)},{1 + step % 7}" for step in steps]
        (folder / "history.csv").write_text("\n".join(["step,epoch,loss,lr,grad_norm", *lines]) + "\n")
        if heldout:
            self.write_samples(stage)
            (folder / "heldout.csv").write_text("step,loss\n" + "".join(f"{step},{2 / (step + 1)}\n" for step in range(9, 300, 10)))
        said = {
            "questions": len(rows),
            "accuracy": float(np.mean(table["exact"])),
            "accuracy_blind": float(np.mean(table["blind_exact"])),
            "loss": 0.25,
            "seconds": 12.5,
            "peak_memory_gb": 1.25,
            "steps": 300,
            "train_loss": 0.02,
        }
        self.metrics(stage, **(said | figures))

    def write_answers(self, stage: str, rows: list[dict[str, Any]]) -> pa.Table:
        """predictions.parquet alone."""
        path = self.folder / "results" / stage / "predictions.parquet"
        columns = {name: [row[name] for row in rows] for name in (*TEXTS, "turn", "images")}
        questions, references = columns["question"], columns["reference"]
        chosen, _ = choose_metrics("auto", questions, references)
        table = make_table(columns, [np.array(row["log_likelihood"]) for row in rows], chosen=chosen)
        with writing_tables(path) as write:
            write(table)
        return table

    def write_samples(self, stage: str) -> None:
        """Answers to two pictures after every tenth step."""
        asked = [
            {"images": [f"{number}.png"], "question": ASKED[2 * number], "reference": WORDS[2 * number], "where": "x:1", "turn": 0}
            for number in range(2)
        ]
        measured = [{"step": step, "answers": ["Hm.", "Yes." if step > 200 else f"at {step}"]} for step in range(9, 300, 10)]
        path = self.folder / "results" / stage / "samples.json"
        path.write_text(json.dumps({"questions": asked, "measured": measured}))

    def metrics(self, stage: str, **figures: Any) -> None:
        (self.folder / "metrics").mkdir(exist_ok=True)
        (self.folder / f"metrics/{stage}.json").write_text(json.dumps(figures))

    def demo(self) -> None:
        """All four stages of a sound run."""
        self.metrics("extract", images=8, cache_mb=1.5, seconds=2.0, peak_memory_gb=0.5)
        self.metrics("tokenize", seconds=1.0, peak_memory_gb=0.4, heldout={"rows": 120, "tokens": 9000})
        self.write("pretrain", self.rows(wrong_every=3))
        self.write("sft", self.rows(wrong_every=5), heldout=True)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    monkeypatch.chdir(tmp_path)
    return Results(tmp_path)
