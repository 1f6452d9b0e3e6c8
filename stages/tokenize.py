"""Stage 2: conversations to token ids, supervised spans and image positions.

Reads the records of every data set, and from data/features_meta P and which images extract has decoded; others are decoded
here, once, so that no row whose image is broken reaches training. Writes data/tokens/{pretrain,sft,heldout}.arrow,
data/tokens/refused.jsonl, the rows that did not fit with file, line and reason, and data/tokens/rejected_*.csv, the rows
that are broken. Stops when a picture that is held out is also trained on.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from tqdm import tqdm

from pipeline.core import ARTEFACT, BAD_ROWS, PipelineError, brief, merged_tokens, publish_folder, verify, writing
from pipeline.params import Data, StageParams
from pipeline.records import Mixture, Source, as_arrow, no_pictures, open_dataset, row_policy, side_of
from pipeline.text import PromptBuilder, RowFilter, RowTokenizer, Summary, TokenTable, tokenize, write_tokens
from stages.run import run_stage

SPLITS = ("pretrain", "sft", "heldout")
META = Path("data/features_meta")


def main(params: StageParams) -> dict[str, Any]:
    meta = _read_meta(META / "encoder.json")
    llm, limits = params.llm, params.tokenize
    tokens = merged_tokens(meta["tokens"], params.projector.factor)
    builder = PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=tokens, date=llm.date)
    figures: dict[str, Any] = {}
    sources = {split: open_dataset(getattr(params.data, split), limit=params.data.limit) for split in SPLITS}
    with publish_folder(Path("data/tokens")) as folder, _listing(folder / "refused.jsonl") as refuse:
        for split, source in sources.items():
            summary, row_filter = Summary(), _row_filter(params.data, split)
            with (
                tqdm(desc=f"tokenize {split}", unit="row", mininterval=0.5) as bar,
                row_policy(source, params.data, rejected=folder / f"rejected_{split}.csv") as policy,
            ):
                batches = tokenize(
                    source.records(),
                    RowTokenizer(builder, source.images, limits.max_tokens, limits.too_long, row_filter),
                    summary,
                    workers=params.runtime.tokenize_workers,
                    progress=bar.update,
                    reject=policy.reject,
                    refuse=refuse,
                )
                with closing(batches):
                    write_tokens(folder / f"{split}.arrow", batches, builder.spec())
                policy.accept(summary.rows_in - summary.bad)
            _tell(split, source, row_filter, summary)
            figures[split] = _figures(split, getattr(params.data, split).records, row_filter, summary)
        _require_held_out(folder)
    return figures


@contextmanager
def _listing(path: Path) -> Iterator[Callable[[dict[str, str]], None]]:
    """Yields what adds a row to a list of rows, a line each."""
    with ExitStack() as opened:
        with writing(path):
            file = opened.enter_context(path.open("w", encoding="utf-8"))

        def add(row: dict[str, str]) -> None:
            with writing(path):
                file.write(json.dumps(row) + "\n")

        yield add
        with writing(path):
            file.close()


def _read_meta(path: Path) -> dict[str, Any]:
    verify(path.parent, remedy="dvc repro -f -s extract")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"cannot be read: {brief(error)}", where=str(path), remedy="dvc repro extract", code=ARTEFACT) from None


def _row_filter(data: Data, split: str) -> RowFilter:
    heldout = data.heldout
    return RowFilter(META / "images.npy", side_of(heldout, trained=split != "heldout"), heldout.share, heldout.seed)


def _tell(split: str, source: Source | Mixture, row_filter: RowFilter, summary: Summary) -> None:
    """What became of rows that are not bad and not used either."""
    if isinstance(source, Mixture):
        for part, (rows, taken) in source.counts.items():
            print(f"tokenize {split}: {part}: {taken:,} rows taken of {rows:,}")
    if row_filter.side:
        other = "held out" if row_filter.side == "train" else "for training"
        first = f", first: {summary.straddling[0]}" if summary.straddling else ""
        print(
            f"tokenize {split}: {summary.rows + summary.refused:,} of {summary.rows_in:,} rows, {summary.other_side:,} "
            f"are {other}, {summary.both_sides:,} have pictures of both sides and are not used{first}"
        )
    if summary.refused or summary.cut:
        first = f", first: {summary.too_long[0]['where']} ({summary.too_long[0]['reason']})" if summary.refused else ""
        print(f"tokenize {split}: {summary.cut} rows cut, {summary.refused} refused (data/tokens/refused.jsonl){first}")


def _figures(split: str, records: str, row_filter: RowFilter, summary: Summary) -> dict[str, Any]:
    """The figures of one data set: rows_in = rows + refused + rejected, and with a held-out share + other_side + both_sides."""
    if row_filter.side and summary.rows + summary.refused == 0:
        what = f"none of {summary.rows_in:,} rows is " + ("held out" if split == "heldout" else "left to train on")
        raise PipelineError(what, where=records, remedy="change data.heldout.share or data.limit", code=BAD_ROWS)
    if not summary.rows:
        raise PipelineError("no row fits", where=records, remedy="raise tokenize.max_tokens", code=BAD_ROWS)
    if split == "pretrain" and not summary.images:
        raise no_pictures(f"data.pretrain: {records}")
    sides = {"other_side": summary.other_side, "both_sides": summary.both_sides} if row_filter.side else {}
    return {
        "rows_in": summary.rows_in,
        "rows": summary.rows,
        "rejected": summary.bad,
        "refused": summary.refused,
        **sides,
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
