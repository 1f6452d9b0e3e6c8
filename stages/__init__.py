"""The four stages of dvc.yaml, run as `python -m stages.NAME`: parameters in, library called, outputs written."""

import ctypes
import os
import signal
import sys

import pipeline  # noqa: F401  before torch: how its threads wait


def _die_with_parent() -> None:
    """End when DVC ends: killed with -9 it would leave this process writing the outputs of the next run."""
    if sys.platform.startswith("linux") and "DVC_ROOT" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)


_die_with_parent()
