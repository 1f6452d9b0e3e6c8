"""Patch features and token ids in, loss or generated ids out: projector, splice and language model, and their checkpoint.

vlm          the model put together          splice, projector, language_model   its parts
attention    which one, and its masks        packed_attention                    rows end to end, on GPUs
ordered_attention   padded rows, on GPUs
freezing     what trains                     sharding, compiling                 how it is computed
last_layer, cross_entropy   less work for the same loss
checkpoint   the model on disk               generation                          prompts -> answers
"""

from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.attention import can_pack, choose_attention, sliding_window
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.compiling import compiled_layers
from pipeline.vlm.model.freezing import cast_frozen, freeze, frozen_digest, weights_digest
from pipeline.vlm.model.generation import GREEDY, generate
from pipeline.vlm.model.language_model import hidden_size, language_model_files, load_language_model
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.sharding import full_tensor, gather_weights, reshard, shard_like, shard_model, sync_gradients
from pipeline.vlm.model.vlm import VisionLanguageModel

__all__ = [
    "GREEDY",
    "PACKED",
    "Manifest",
    "VisionLanguageModel",
    "build_projector",
    "can_pack",
    "cast_frozen",
    "checkpoint",
    "choose_attention",
    "compiled_layers",
    "freeze",
    "frozen_digest",
    "full_tensor",
    "gather_weights",
    "generate",
    "hidden_size",
    "language_model_files",
    "load_language_model",
    "reshard",
    "shard_like",
    "shard_model",
    "sliding_window",
    "sync_gradients",
    "weights_digest",
]
