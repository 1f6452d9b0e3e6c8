"""Image bytes in, patch features out: the frozen vision tower, the same way in every stage.

preprocess   bytes -> pixels          tower        any CLIP or SigLIP checkpoint          encoder      pixels -> features
fused        several encoders, joined in the channel
"""
