"""`python -m pipeline.check [DATA ...]`: what do these data hold, and what is wrong with them?"""

from pipeline.check.command import app

if __name__ == "__main__":
    app()
