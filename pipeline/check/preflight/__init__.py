"""All that stands in the way of a run, found before any of it: the stages begin with it, `python -m pipeline.check` prints it.

Only configurations, tokenizers, file lists and a model without weights are looked at; no picture is read and no more rows
than are needed to know whether there are many. Nothing here decides an output, so no stage depends on it.

findings   what is found                        project    what the checks look at, each part read once
models     folders whole, families that fit     behaviour  what layers do, on a random model with few of them
tokens     tokenizer, image token, lengths      export     what leaves as LLaVA
training   steps and batches                    machine    memory and disk
tracking   what a queued experiment would not see

A check is a function from a `Project` to its findings and stands in `CHECKS`; none depends on another.
"""

from collections.abc import Callable, Iterator

from pipeline.check.preflight.behaviour import check_behaviour
from pipeline.check.preflight.export import check_export
from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.machine import check_disk, check_memory
from pipeline.check.preflight.models import check_encoder, check_language_model, check_start
from pipeline.check.preflight.project import Project
from pipeline.check.preflight.tokens import check_lengths, check_tokenizer
from pipeline.check.preflight.tracking import check_tracking
from pipeline.check.preflight.training import check_steps
from pipeline.params import Params

CHECKS: tuple[Callable[[Project], Iterator[Finding]], ...] = (
    check_encoder,
    check_language_model,
    check_behaviour,
    check_start,
    check_tokenizer,
    check_lengths,
    check_export,
    check_steps,
    check_memory,
    check_disk,
    check_tracking,
)


def preflight(params: Params) -> list[Finding]:
    """Everything that is found about a project whose root is the current folder, faults first."""
    project = Project(params)
    found = [finding for check in CHECKS for finding in check(project)]
    return sorted(dict.fromkeys(found), key=lambda finding: finding.note)


__all__ = ["CHECKS", "Finding", "Project", "check_tracking", "preflight"]
