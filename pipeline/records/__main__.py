"""`python -m pipeline.records repack IN.parquet OUT.parquet`: the same rows in small row groups.

A picture in a Parquet file can only be reached through its row group. Files written in one piece have one group of up to a
million rows, which is fine in order and hopeless at random, as the live encoder reads. Rows and columns stay as they are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from tqdm import tqdm

from pipeline.core import PipelineError, brief, exit_on_error, publish, run_command
from pipeline.records.formats.unpacking import unpacked, why

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.callback()
def _commands() -> None:
    """Files of rows."""


@app.command()
def repack(
    source: Annotated[Path, typer.Argument(help="A Parquet file.")],
    out: Annotated[Path, typer.Argument(help="Where the new one goes.")],
    rows: Annotated[int, typer.Option(min=1, max=100_000, help="Rows a group.")] = 100,
) -> None:
    """Write a Parquet file again in small row groups, for reading its pictures at random."""
    exit_on_error(lambda: _repack(source, out, rows))


def _repack(source: Path, out: Path, rows: int) -> None:
    if out.exists():
        raise PipelineError("exists", where=str(out), remedy="name another file or remove it")
    if source.exists() and not source.is_file():
        raise PipelineError("no file", where=str(source), remedy="name a Parquet file")
    try:
        parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except FileNotFoundError:
        raise PipelineError("no such file", where=str(source)) from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise PipelineError(f"not a readable Parquet file: {brief(error)}", where=str(source)) from None
    total = parquet.metadata.num_rows
    options = {"use_dictionary": False, "write_page_checksum": True}
    with publish(out) as temporary, pq.ParquetWriter(temporary, parquet.schema_arrow, **options) as writer:
        for batch in tqdm(_batches(parquet, rows, source), total=-(-total // rows), unit="group", desc="repack", mininterval=0.5):
            writer.write_batch(batch, row_group_size=rows)
    print(f"{out}: {total:,} rows in groups of {rows}")


def _batches(parquet: pq.ParquetFile, rows: int, source: Path) -> Iterator[pa.RecordBatch]:
    """Every row, validated; raises `PipelineError` for damage and for rows that the footer counts and the file lacks."""
    done, total = 0, parquet.metadata.num_rows
    try:
        for batch in unpacked(parquet.iter_batches(batch_size=rows, use_threads=False)):
            batch.validate(full=True)
            done += batch.num_rows
            yield batch
            del batch
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise PipelineError(f"behind row {done:,}: {why(error)}", where=str(source)) from None
    if done != total:
        raise PipelineError(f"{done:,} rows, its footer says {total:,}", where=str(source))


if __name__ == "__main__":
    run_command(app)
