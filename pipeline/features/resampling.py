"""Which Pillow resizes: from one major version to the next a few pictures come out otherwise, so rows of two never share a store.

Of 200 pictures of noise, resized by five filters, 5 differ between 12.3 and 13.0, by up to 27 of 255.
"""

import sys
from collections.abc import Mapping
from typing import Any

import PIL

REFERENCE = 12  # the major version of features that do not name one
KEY = "resampling"
_told = set[str]()


def resampling_of(version: str) -> dict[str, str]:
    """What a feature's spec says of it: nothing for the version that all stores without it were made with."""
    major = int(version.partition(".")[0])
    return {} if major == REFERENCE else {KEY: f"Pillow {major}"}


def resampling() -> dict[str, str]:
    """Of the Pillow that is installed."""
    return resampling_of(PIL.__version__)


def named(spec: Mapping[str, Any]) -> str:
    """The Pillow that a spec's features were made with."""
    return str(spec.get(KEY, f"Pillow {REFERENCE}"))


def warn_of_resampling(spec: Mapping[str, Any], where: str, remedy: str) -> None:
    """One line, once a place, where features were made with another Pillow than the one that resizes now."""
    made, here = named(spec), named(resampling())
    if made == here or where in _told:
        return
    _told.add(where)
    pip = f"pip install 'pillow=={made.removeprefix('Pillow ')}.*'"
    line = f"warning: {where}: made with {made}, which resizes some pictures otherwise than {here} here -> {pip}, or {remedy}"
    print(line, file=sys.stderr, flush=True)
