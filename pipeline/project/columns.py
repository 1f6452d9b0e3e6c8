"""`--column text=description` of `glance new`: what `columns` is in params.yaml."""

import re
from collections.abc import Sequence

from pipeline.core import PipelineError
from pipeline.params import Columns

PARTS = [name for name in Columns.model_fields if name != "ignore"]
_ASKED = re.compile(rf"(?:set )?\bcolumns\.({'|'.join(PARTS)})\b")


def read_columns(given: Sequence[str]) -> dict[str, str]:
    """["text=description"] -> {"text": "description"}; raises `PipelineError` for a part that rows do not have."""
    found = {part: name for part, _, name in (text.partition("=") for text in given)}
    if len(found) < len(given) or not all(found.values()) or not set(found) <= set(PARTS):
        raise PipelineError(
            f"expected PART=COLUMN, got {' '.join(given)}", where="--column", remedy=f"PART is one of {', '.join(PARTS)}"
        )
    return found


def as_option(error: PipelineError) -> PipelineError:
    """An error whose remedy is a key of `columns`, with this command's option in its place."""
    remedy = _ASKED.sub(r"--column \1=NAME", error.remedy)
    return PipelineError(error.what, where=error.where, remedy=remedy, code=error.code)
