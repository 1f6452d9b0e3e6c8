"""Glance: any frozen CLIP and any small causal language model become a vision-language model.

The modules follow the data: params, records, images, vision, features, text, tokens, batches, model,
training, checkpoint, evaluate, chat. Nothing here has effects on import.
"""

__version__ = "0.1.0"
