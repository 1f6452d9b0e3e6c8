"""torch.compile for the decoder layers of a model that trains: one program for all of them, for what lies around them none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.model import VisionLanguageModel


@contextmanager
def compiled_layers(model: VisionLanguageModel, on: bool) -> Iterator[None]:
    """Within, each decoder layer runs compiled; same function to rounding.

    It is taken off at the end, since generation would be compiled anew for the lengths it meets.
    """
    layers = list(model.language_model.get_decoder().layers) if on else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
