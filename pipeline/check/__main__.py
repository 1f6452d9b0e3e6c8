"""`python -m pipeline.check [DATA ...]`: what do these data hold, and what is wrong with them?"""

from pipeline.check.command import app
from pipeline.core import run_command

if __name__ == "__main__":
    run_command(app)
