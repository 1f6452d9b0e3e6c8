"""Does caching pay for these data, this encoder, this language model and so many epochs? Measured here, then computed.

rates      seconds of a row of features, measured (those of steps and pictures are `pipeline.check`'s)
verdict    what a run takes with the cache and live, and from when on the cache is ahead              telling    the same in words
"""

from pipeline.advise.command import advise
from pipeline.advise.telling import as_lines
from pipeline.advise.verdict import Advice, Choice

__all__ = ["Advice", "Choice", "advise", "as_lines"]
