"""Image bytes -> pixels, as the encoder's own preprocessor says, with one backend on every machine."""

from typing import Any

import numpy as np
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core.loading import unloadable
from pipeline.records import DECODER, decode


class Preprocessor:
    """Image bytes -> uint8 pixels [3, side, side] for the encoder; normalisation is left to the device.

    Pillow does the resizing on every machine: Transformers' other backend gives slightly different pixels.
    """

    def __init__(self, model: str, revision: str = "") -> None:
        try:
            self._processor = AutoImageProcessor.from_pretrained(
                model, revision=revision or "main", backend="pil", trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise unloadable(model, error, where="vision.model") from None
        settings = self._processor
        self.rescale = float(settings.rescale_factor) if settings.do_rescale else 1.0
        self.mean = [float(value) for value in settings.image_mean] if settings.do_normalize else [0.0] * 3
        self.std = [float(value) for value in settings.image_std] if settings.do_normalize else [1.0] * 3

    def __call__(self, data: bytes, *, where: str) -> np.ndarray:
        picture = decode(data, where=where)
        pixels = self._processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.uint8)

    def size(self) -> tuple[int, int]:
        """Height and width of the pixels that any picture becomes."""
        pixels = self._processor(Image.new("RGB", (8, 8)), return_tensors="np")["pixel_values"]
        return int(pixels.shape[-2]), int(pixels.shape[-1])

    def describe(self) -> dict[str, Any]:
        """What decides a pixel: part of the features' fingerprint."""
        keep = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "do_normalize", "do_pad")
        settings = {key: value for key, value in self._processor.to_dict().items() if key in keep and value is not None}
        return {**settings, "rescale": self.rescale, "mean": self.mean, "std": self.std, "decoder": DECODER}
