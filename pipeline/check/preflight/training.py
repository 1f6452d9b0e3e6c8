"""Steps and batches: data so few that nothing is learnt from them is said before, not after."""

from collections.abc import Iterator
from itertools import islice

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project
from pipeline.core import PipelineError
from pipeline.params import Dataset
from pipeline.records import BadRow, open_dataset

FEW = 20  # steps: less than a warm-up takes
SEEN = 5_000  # rows looked at: more are enough


def check_steps(project: Project) -> Iterator[Finding]:
    """A note where a batch holds more than the data do, or there are too few steps."""
    for name, training, dataset in project.trainings():
        rows = _rows(dataset, project.params.data.limit, min(SEEN, FEW * training.batch_size))
        if rows is None:
            continue
        steps = -(-rows // training.batch_size) * training.epochs
        if rows < training.batch_size:
            remedy = f"lower {name}.batch_size or bring more rows"
            yield Finding(f"is {training.batch_size}, the data have {rows} rows", f"{name}.batch_size", remedy, note=True)
        if steps < FEW:
            remedy = f"lower {name}.batch_size or raise {name}.epochs"
            yield Finding(f"{steps} step{'s' * (steps > 1)} in all: little is learnt from so few", name, remedy, note=True)


def _rows(dataset: Dataset, limit: int, enough: int) -> int | None:
    """Rows of a data set where they are fewer than `enough`; None for more, and where they cannot be read."""
    try:
        rows = sum(1 for row in islice(open_dataset(dataset, limit=limit).records(), enough) if not isinstance(row, BadRow))
    except PipelineError:  # the stage that reads them says what is wrong
        return None
    return rows if rows < enough else None
