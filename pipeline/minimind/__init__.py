"""MiniMind and MiniMind-V weight files (`.pth`) <-> Transformers folders and checkpoints of this project.

pth            reads and writes the file itself, without ever running code from it
layout         which model it is: tensor names and shapes
configuration  its counterpart in Transformers
convert        tensors of one layout <-> tensors of the Transformers class that computes the same
projector      MiniMind-V's `vision_proj`
importing, exporting   the whole operations; `python -m pipeline.minimind` calls them
"""
