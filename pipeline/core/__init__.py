"""What every room stands on: one-line errors, files that appear whole, prefetching, devices and number formats.

Nothing comes in but the operating system and torch. What needs torch is imported from its own module (`devices`, `loading`,
`attention`), so that a command that only checks params starts at once.
"""

from pipeline.core.checksums import file_digests, is_signed, record, seal, sign, to_json, unseal, verify
from pipeline.core.costs import costs_of, keep_figures
from pipeline.core.disk import best_effort, map_array, map_arrow, map_tensors, reserve, set_mode, sync
from pipeline.core.errors import (
    ARTEFACT,
    BAD_ROWS,
    BUSY,
    DEFECT,
    INTERRUPTED,
    NUMERIC,
    RESOURCE,
    USAGE,
    PipelineError,
    brief,
    final_name,
)
from pipeline.core.files import (
    is_left_over,
    link_or_copy,
    main_checkout,
    make_folder,
    publish,
    publish_folder,
    remove_leftovers,
    temporary_name,
    write_json,
    writing,
)
from pipeline.core.fingerprint import fingerprint
from pipeline.core.frame import LAUNCHED, as_line, debugging, exit_on_error, run_command, take_debug
from pipeline.core.grid import merged_tokens
from pipeline.core.locks import hold, is_alive, is_held, machine
from pipeline.core.memory import bounded_memory
from pipeline.core.prefetch import patience, prefetch
from pipeline.core.processes import SAFE_FORK, die_with_parent, end_process, fork_process
from pipeline.core.project import enter_project, in_project, named_by
from pipeline.core.quiet import quiet_libraries

__all__ = [
    "ARTEFACT",
    "BAD_ROWS",
    "BUSY",
    "DEFECT",
    "INTERRUPTED",
    "LAUNCHED",
    "NUMERIC",
    "RESOURCE",
    "SAFE_FORK",
    "USAGE",
    "PipelineError",
    "as_line",
    "best_effort",
    "bounded_memory",
    "brief",
    "costs_of",
    "debugging",
    "die_with_parent",
    "end_process",
    "enter_project",
    "exit_on_error",
    "file_digests",
    "final_name",
    "fingerprint",
    "fork_process",
    "hold",
    "in_project",
    "is_alive",
    "is_held",
    "is_left_over",
    "is_signed",
    "keep_figures",
    "link_or_copy",
    "machine",
    "main_checkout",
    "make_folder",
    "map_array",
    "map_arrow",
    "map_tensors",
    "merged_tokens",
    "named_by",
    "patience",
    "prefetch",
    "publish",
    "publish_folder",
    "quiet_libraries",
    "record",
    "remove_leftovers",
    "reserve",
    "run_command",
    "seal",
    "set_mode",
    "sign",
    "sync",
    "take_debug",
    "temporary_name",
    "to_json",
    "unseal",
    "verify",
    "write_json",
    "writing",
]
