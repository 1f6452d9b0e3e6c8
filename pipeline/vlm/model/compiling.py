"""torch.compile for the decoder layers of a model that trains: one program for all of them, for what lies around them none."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.vlm.model.attention import FAMILIES
from pipeline.vlm.model.roles import decoder_layers
from pipeline.vlm.model.vlm import VisionLanguageModel


@contextmanager
def compiled_layers(model: VisionLanguageModel, on: bool) -> Iterator[None]:
    """Within, decoder layers run compiled; same function to rounding. Not a last one that does less
    (`pipeline.vlm.model.last_layer`).

    It is taken off at the end, since generation would be compiled anew for the lengths it meets.
    """
    layers = list(decoder_layers(model.language_model)) if on else []
    if model.language_model.config.model_type in FAMILIES:
        layers = layers[:-1]
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
