"""Does caching pay for these data, this encoder, this language model and so many epochs? Measured here, then computed.

sample     a few of the user's rows as a training stage's inputs     rates      seconds a picture and a row, measured on them
verdict    what a run takes with the cache and live, and from when on the cache is ahead              telling    the same in words
"""

from pipeline.advise.command import advise
from pipeline.advise.telling import as_lines
from pipeline.advise.verdict import Advice, Choice, Rates, Work

__all__ = ["Advice", "Choice", "Rates", "Work", "advise", "as_lines"]
