"""The four stages of dvc.yaml, run as `python -m stages.NAME`: parameters in, library called, outputs written."""

import os

# Before torch loads OpenMP: threads that spin while they wait make a stage ten times slower as soon as anything else
# runs on the machine; sleeping ones cost it a few percent when nothing does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
