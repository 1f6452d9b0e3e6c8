"""`python -m pipeline.doctor`: what is left behind here, and what mends it?"""

import typer

from pipeline.core import run_command
from pipeline.doctor.command import doctor

if __name__ == "__main__":
    run_command(lambda: typer.run(doctor))
