"""Glance: any frozen CLIP and any small causal language model become a vision-language model.

Rooms, lowest first; each imports only rooms before it: core, params, records, then text and features, vlm (batches, model,
evaluation, training), and what a person types: check, chat, minimind, export. docs/architecture.md has the picture.
The one effect of the import is on how torch's threads wait, in stages and commands alike.
"""

import os

# Before torch loads OpenMP: how long its threads spin before they sleep. As long as by default, a stage is several
# times slower as soon as anything else runs on the machine; not at all, a small model loses a third of its speed. The
# embedded sft on two cores, steps a second alone / beside one busy process: 9.1 / 2.1, 6.8 / 5.8, and with this 8.5 / 4.2.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# oneDNN keeps a compiled program for each of the last 1,024 shapes, which is a gigabyte with batches of many lengths
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

__version__ = "0.1.0"
