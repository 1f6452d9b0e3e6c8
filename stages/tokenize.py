"""Stage 2: conversations to token ids, supervised spans and image positions.

Reads the records of every data set and P from data/features_meta.json; writes data/tokens/{pretrain,sft,heldout}.arrow
and data/tokens/refused.jsonl, the rows that did not fit with file, line and reason. Stops when a picture that is held
out is also trained on.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.errors import BAD_ROWS, PipelineError
from pipeline.files import publish_folder
from pipeline.params import StageParams
from pipeline.records import read_records
from pipeline.stage import run_stage
from pipeline.text import PromptBuilder
from pipeline.tokenization import Summary, tokenize
from pipeline.tokens import TokenTable, write_tokens

SPLITS = ("pretrain", "sft", "heldout")


def main(params: StageParams) -> dict[str, Any]:
    meta = json.loads(Path("data/features_meta.json").read_text(encoding="utf-8"))
    llm, limits = params.llm, params.tokenize
    builder = {"model": llm.model, "revision": llm.revision, "image_token": llm.image_token, "tokens": meta["tokens"]}
    spec = PromptBuilder(**builder).spec()
    figures: dict[str, Any] = {}
    with publish_folder(Path("data/tokens")) as folder:
        refused: list[dict[str, str]] = []
        for split in SPLITS:
            dataset = getattr(params.data, split)
            summary = Summary()
            records = read_records(dataset.records, limit=params.data.limit)
            with tqdm(desc=f"tokenize {split}", unit="row", mininterval=0.5) as bar:
                batches = tokenize(
                    records,
                    (builder, dataset.images, limits.max_tokens, limits.too_long),
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
    held = {key.tobytes() for key in np.unique(TokenTable(folder / "heldout.arrow").image_hashes(), axis=0)}
    for split in ("pretrain", "sft"):
        table = TokenTable(folder / f"{split}.arrow")
        hashes = table.image_hashes()
        shared = [slot for slot in range(len(hashes)) if hashes[slot].tobytes() in held]
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
