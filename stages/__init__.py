"""The four stages of dvc.yaml, run as `python -m stages.NAME`: parameters in, library called, outputs written."""
