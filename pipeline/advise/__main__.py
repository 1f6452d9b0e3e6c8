"""`python -m pipeline.advise [KEY=VALUE ...]`: does caching pay, measured on this machine?"""

from pipeline.advise.command import app
from pipeline.core import run_command

if __name__ == "__main__":
    run_command(app)
