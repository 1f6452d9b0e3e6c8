"""`python -m pipeline.score MODEL TASK…`: a trained model on local copies of public benchmarks."""

import typer

from pipeline.core import run_command
from pipeline.score.command import score

if __name__ == "__main__":
    run_command(lambda: typer.run(score))
