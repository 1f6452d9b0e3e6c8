"""A trained model for the world outside: a Transformers LLaVA folder, or GGUF files for llama.cpp, each proven to give
this pipeline's numbers before it is called done. See docs/export.md.

Reads a checkpoint folder, its encoder and a few held-out rows; writes one folder, whole or not at all.
"""
