"""Where an answer's words come from in the pictures: a heat map [side, side] over the encoder's patches for each word.

view       an answered talk in, maps out          words     token ids -> words
rollout    by attention                           gradient  by gradients
placement  where the patches lie in the picture   heatmap   maps drawn over it
"""

from pipeline.saliency.heatmap import draw_sheet, heat_layer
from pipeline.saliency.placement import Box, find_box
from pipeline.saliency.view import GRADIENT, METHODS, ROLLOUT, TOKENS, Maps, Seen, look_back

__all__ = [
    "GRADIENT", "METHODS", "ROLLOUT", "TOKENS", "Box", "Maps", "Seen", "draw_sheet", "find_box", "heat_layer", "look_back",
]  # fmt: skip
