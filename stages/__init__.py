"""The four stages of dvc.yaml, run as `python -m stages.NAME`: parameters in, library called, outputs written."""

import ctypes
import os
import signal
import sys

# Before torch loads OpenMP: how long its threads spin before they sleep. As long as by default, a stage is several
# times slower as soon as anything else runs on the machine; not at all, a small model loses a third of its speed. The
# embedded sft on two cores, steps a second alone / beside one busy process: 9.1 / 2.1, 6.8 / 5.8, and with this 8.5 / 4.2.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps a compiled program for each of the last 1,024 shapes, which is a gigabyte with batches of many lengths
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


def _die_with_parent() -> None:
    """End when DVC ends: killed with -9 it would leave this process writing the outputs of the next run."""
    if sys.platform.startswith("linux") and "DVC_ROOT" in os.environ:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGTERM)


_die_with_parent()
