"""Models from Transformers' folders or the hub, one at a time and with their faults named.

While `from_pretrained` works it replaces a method of a class, for the whole process. Two threads that load at once can
leave it replaced, and every model loaded after that lacks its tied weights (seen with Transformers 5.23).
"""

import threading
from typing import Any

from pipeline.core.errors import ARTEFACT, PipelineError, brief
from pipeline.core.outside import check_model

ONE_AT_A_TIME = threading.Lock()


def load_pretrained(family: Any, model: str, *, where: str, revision: str = "", **options: Any) -> tuple[Any, dict[str, Any]]:
    """What `family.from_pretrained` gives, and what it says of missing, left-over and misshapen tensors.

    `where` is the parameter that named `model`. Raises `PipelineError` when there is no such model or it cannot be read.
    """
    with ONE_AT_A_TIME:
        found: tuple[Any, dict[str, Any]] = read_pretrained(
            family, model, where=where, revision=revision, output_loading_info=True, **options
        )
    return found


def read_pretrained(family: Any, model: str, *, where: str, revision: str = "", **options: Any) -> Any:
    """What `family.from_pretrained` gives: a configuration, a tokenizer, an image processor; no code of the model's runs.

    Raises `PipelineError` naming the parameter `where`, whatever a library makes of a folder: hostile ones raise anything.
    """
    check_model(model, where=where, revision=revision)
    try:
        return family.from_pretrained(model, revision=revision or "main", trust_remote_code=False, **options)
    except (PipelineError, MemoryError):
        raise
    except Exception as error:  # a hostile config.json raises whatever the code that trusts it stumbles over
        raise unloadable(model, error, where=where) from None


def unloadable(model: str, error: Exception, *, where: str) -> PipelineError:
    """The one line for a model that a library cannot read."""
    remedy = "give a Transformers folder, or a hub id reachable from here"
    return PipelineError(f"cannot load {model}: {brief(error)}", where=where, remedy=remedy, code=ARTEFACT)
