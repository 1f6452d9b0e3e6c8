"""Glance: any frozen CLIP and any small causal language model become a vision-language model.

Rooms, lowest first; each imports only rooms before it: core, params, records, then text and features, vlm (batches, model,
evaluation, training), and what a person types: check, chat, minimind, export. docs/architecture.md has the picture.
The import has two effects: on how torch's threads wait, in stages and commands alike, and, where it is the beginning of one of
them, on Ctrl-C.
"""

import _signal  # the module behind `signal`, which takes a while to import itself
import os
import sys

# `python -m pipeline.NAME` or `stages.NAME`, which Python is still looking for, or the script `glance`: until the frame of
# pipeline/core/frame.py stands, seconds later with torch, Ctrl-C ends the process; imports that stop halfway have nothing to say.
_is_beginning = sys.argv[:1] == ["-m"] or os.path.basename(*sys.argv[:1] or [""]) == "glance"
if _is_beginning and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

# Before torch loads OpenMP: how long its threads spin before they sleep. As long as by default, a stage is several
# times slower as soon as anything else runs on the machine; not at all, a small model loses a third of its speed. The
# embedded sft on two cores, steps a second alone / beside one busy process: 9.1 / 2.1, 6.8 / 5.8, and with this 8.5 / 4.2.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps a compiled program for each of the last 1,024 shapes, which is a gigabyte with batches of many lengths
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

__version__ = "0.1.0"
