"""What a crash or a careless hand leaves behind, and what mends it: `python -m pipeline.doctor`.

A check is a function of the project's folder that yields what it finds; `finding.py` says what a finding is. `git.py` looks at
the repository, `dvc.py` at DVC's own folders and its cache, `leftovers.py` at this project's files, `machine.py` at what runs.
"""

from pipeline.doctor.command import CHECKS, doctor
from pipeline.doctor.finding import Finding

__all__ = ["CHECKS", "Finding", "doctor"]
