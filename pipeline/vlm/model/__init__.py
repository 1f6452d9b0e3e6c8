"""Patch features and token ids in, loss or generated ids out: projector, splice and language model, and their checkpoint.

vlm          the model put together          splice, projector, language_model   its parts
attention    which one, and its masks        packed_attention                    rows end to end, on GPUs
ordered_attention   padded rows, on GPUs
roles        a language model's parts        probing                             what it does, by trying
freezing     what trains                     sharding, compiling                 how it is computed
last_layer, cross_entropy   less work for the same loss
checkpoint   the model on disk               standard                            what LLaVA has a place for
generation   prompts -> answers
"""

from pipeline.vlm.model import checkpoint
from pipeline.vlm.model.attention import can_pack, choose_attention
from pipeline.vlm.model.checkpoint import Manifest
from pipeline.vlm.model.compiling import compiled_layers
from pipeline.vlm.model.freezing import cast_frozen, freeze, frozen_digest, weights_digest
from pipeline.vlm.model.generation import GREEDY, generate
from pipeline.vlm.model.language_model import hidden_size, language_model_files, load_language_model
from pipeline.vlm.model.packed_attention import PACKED
from pipeline.vlm.model.probing import logit_factor, mixes_conversations, require_fit
from pipeline.vlm.model.projector import build_projector
from pipeline.vlm.model.roles import backbone, backbone_name, decoder_layers, output_head
from pipeline.vlm.model.sharding import full_tensor, gather_weights, gathered, reshard, shard_like, shard_model, sync_gradients
from pipeline.vlm.model.standard import BIASLESS, LAYERS, out_of_place, require_idefics3, require_place
from pipeline.vlm.model.vlm import VisionLanguageModel

__all__ = [
    "BIASLESS",
    "GREEDY",
    "LAYERS",
    "PACKED",
    "Manifest",
    "VisionLanguageModel",
    "backbone",
    "backbone_name",
    "build_projector",
    "can_pack",
    "cast_frozen",
    "checkpoint",
    "choose_attention",
    "compiled_layers",
    "decoder_layers",
    "freeze",
    "frozen_digest",
    "full_tensor",
    "gather_weights",
    "gathered",
    "generate",
    "hidden_size",
    "language_model_files",
    "load_language_model",
    "logit_factor",
    "mixes_conversations",
    "out_of_place",
    "output_head",
    "require_fit",
    "require_idefics3",
    "require_place",
    "reshard",
    "shard_like",
    "shard_model",
    "sync_gradients",
    "weights_digest",
]
