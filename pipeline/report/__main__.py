"""`python -m pipeline.report`: what the last run gave; with --html a page of it, or of several experiments side by side."""

from pipeline.core import run_command
from pipeline.report.command import app

if __name__ == "__main__":
    run_command(app)
