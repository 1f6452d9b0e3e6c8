"""Stage 2: conversations to token ids, supervised spans and image positions.

Reads the records of every data set and P from data/features_meta.json; writes data/tokens/{pretrain,sft,heldout}.arrow,
data/tokens/refused.jsonl, the rows that did not fit with file, line and reason, and data/tokens/rejected_*.csv, the rows
that are broken. Stops when a picture that is held out is also trained on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from pipeline.datasets import good_rows, open_dataset
from pipeline.errors import ARTEFACT, BAD_ROWS, PipelineError, brief
from pipeline.features import as_arrow
from pipeline.files import publish_folder
from pipeline.params import StageParams
from pipeline.stage import run_stage
from pipeline.text import PromptBuilder
from pipeline.tokenization import Summary, tokenize
from pipeline.tokens import TokenTable, write_tokens

SPLITS = ("pretrain", "sft", "heldout")


def main(params: StageParams) -> dict[str, Any]:
    meta = _read_meta(Path("data/features_meta.json"))
    llm, limits = params.llm, params.tokenize
    builder = {"model": llm.model, "revision": llm.revision, "image_token": llm.image_token, "tokens": meta["tokens"]}
    spec = PromptBuilder(**builder).spec()
    figures: dict[str, Any] = {}
    with publish_folder(Path("data/tokens")) as folder:
        refused: list[dict[str, str]] = []
        for split in SPLITS:
            dataset = getattr(params.data, split)
            summary = Summary()
            source = open_dataset(dataset, limit=params.data.limit)
            with (
                tqdm(desc=f"tokenize {split}", unit="row", mininterval=0.5) as bar,
                good_rows(source, params.data, rejected=folder / f"rejected_{split}.csv") as records,
            ):
                batches = tokenize(
                    records,
                    (builder, source.images, limits.max_tokens, limits.too_long),
                    summary,
                    workers=params.runtime.tokenize_workers,
                    progress=bar.update,
                )
                write_tokens(folder / f"{split}.arrow", batches, spec)
            refused += summary.refused
            figures[split] = _figures(split, dataset.records, summary)
        (folder / "refused.jsonl").write_text("".join(json.dumps(row) + "\n" for row in refused), encoding="utf-8")
        _require_held_out(folder)
    return figures


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"cannot be read: {brief(error)}", where=str(path), remedy="dvc repro extract", code=ARTEFACT) from None


def _figures(split: str, records: str, summary: Summary) -> dict[str, Any]:
    if not summary.rows:
        raise PipelineError("no row fits", where=records, remedy="raise tokenize.max_tokens", code=BAD_ROWS)
    if summary.refused or summary.cut:
        first = f", first: {summary.refused[0]['where']} ({summary.refused[0]['reason']})" if summary.refused else ""
        print(f"tokenize {split}: {summary.cut} rows cut, {len(summary.refused)} refused (data/tokens/refused.jsonl){first}")
    return {
        "rows": summary.rows,
        "refused": len(summary.refused),
        "cut": summary.cut,
        "tokens": summary.tokens,
        "supervised": summary.supervised,
        "longest": summary.longest,
    }


def _require_held_out(folder: Path) -> None:
    """By content: a held-out picture under another name in the training data is still a trained picture."""
    held = as_arrow(TokenTable(folder / "heldout.arrow").image_hashes())
    for split in ("pretrain", "sft"):
        table = TokenTable(folder / f"{split}.arrow")
        hashes = table.image_hashes()
        shared = np.flatnonzero(pc.is_in(as_arrow(hashes), value_set=held).to_numpy(zero_copy_only=False)).tolist()
        if shared:
            row = next(n for n in range(len(table)) if shared[0] in table.row(n).slots)
            raise PipelineError(
                f"{len(shared)} of {len(hashes)} training images are held out, first in {table.where(row)}",
                where=f"data.{split}",
                remedy="remove those rows from the training or the held-out records",
                code=BAD_ROWS,
            )


if __name__ == "__main__":
    run_stage("tokenize", main)
