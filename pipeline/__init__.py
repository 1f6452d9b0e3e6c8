"""Glance: any frozen CLIP and any small causal language model become a vision-language model.

Rooms, lowest first; each imports only rooms before it: core, params, records, then text and features, vlm (batches, model,
evaluation, training), and what a person types: check, chat, minimind, export. docs/architecture.md has the picture.
Nothing here has effects on import.
"""

__version__ = "0.1.0"
