"""Image bytes -> pixels, as the encoder's own preprocessor says, with one backend on every machine."""

import math
from typing import Any

import numpy as np
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from pipeline.core import ARTEFACT, PipelineError, brief
from pipeline.core.loading import read_pretrained
from pipeline.records import DECODER, decode

MAX_SIDE = 4096  # pixels that a preprocessor may ask for
PROBES = ((40, 13), (13, 40), (24, 24), (90, 70))  # width and height of pictures on which it is compared
CLOSE = 1e-5  # of the largest value: rounding of float32


class Preprocessor:
    """Image bytes -> uint8 pixels [3, side, side] for the encoder; normalisation is left to the device.

    Pillow does the resizing on every machine: Transformers' other backend gives slightly different pixels. Whatever switches
    the processor has, its own result is compared once with what is computed here. Raises `PipelineError` where they differ.
    """

    def __init__(self, model: str, revision: str = "") -> None:
        self._model = model
        self._processor = read_pretrained(AutoImageProcessor, model, where="vision.model", revision=revision, backend="pil")
        settings = self._processor
        try:
            self._require_bounds()
            self.rescale = float(settings.rescale_factor) if settings.do_rescale else 1.0
            self.mean = _channels(settings.image_mean) if settings.do_normalize else [0.0] * 3
            self.std = _channels(settings.image_std) if settings.do_normalize else [1.0] * 3
            if not math.isfinite(self.rescale) or 0.0 in self.std:
                raise ValueError("rescale_factor or image_std gives no number")
            self._sizes = [self._compare(size) for size in PROBES]
        except PipelineError:
            raise
        except Exception as error:  # settings of any type meet code that expects others
            raise self._refused(f"cannot be followed: {brief(error)}") from None

    def __call__(self, data: bytes, *, where: str) -> np.ndarray:
        return self.pixels(decode(data, where=where))

    def pixels(self, picture: Image.Image) -> np.ndarray:
        """Of a picture that is decoded."""
        pixels = self._processor(picture, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.uint8)

    def _compare(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that a picture becomes; raises `PipelineError` unless its values are the processor's own."""
        width, height = size
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
        wanted = np.asarray(self._processor(picture, return_tensors="np")["pixel_values"][0])
        pixels = self.pixels(picture)
        if wanted.shape != pixels.shape or pixels.ndim != 3 or len(pixels) != 3:
            raise self._refused(f"gives values of shape {wanted.shape}, expected 3 channels first", "data_format", "do_pad")
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (self.mean, self.std))
        found = (pixels * np.float64(self.rescale) - mean) / std
        if np.abs(found - wanted).max() > CLOSE * max(1.0, float(np.abs(wanted).max())):
            what = "computes more than resizing, cropping, rescaling and normalising, in that order"
            raise self._refused(what, "do_pad", "rescale_offset", "do_flip_channel_order", "do_reduce_labels")
        return int(pixels.shape[1]), int(pixels.shape[2])

    def _require_bounds(self) -> None:
        for name in ("size", "crop_size", "pad_size"):
            sides = dict(getattr(self._processor, name, None) or {})
            if large := {key: side for key, side in sides.items() if isinstance(side, int | float) and side > MAX_SIDE}:
                raise self._refused(f"{name} is {large}, more than {MAX_SIDE:,} pixels")

    def _refused(self, what: str, *suspects: str) -> PipelineError:
        """`suspects` are switches that may be the reason; those that are set are named."""
        set_ = [f"{name}: {value}" for name in suspects if (value := getattr(self._processor, name, None)) not in (None, False)]
        because = f" ({', '.join(set_)})" if set_ else ""
        remedy = "mend that file, or set vision.model"
        return PipelineError(f"its image processor {what}{because}", where=self._model, remedy=remedy, code=ARTEFACT)

    def size(self) -> tuple[int, int]:
        """Height and width of the pixels that any picture becomes; where they differ, those of one that is not square."""
        return next((size for size in self._sizes if size[0] != size[1]), self._sizes[0])

    def describe(self) -> dict[str, Any]:
        """What decides a pixel: part of the features' fingerprint."""
        keep = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "do_normalize", "do_pad")
        settings = {key: value for key, value in self._processor.to_dict().items() if key in keep and value is not None}
        return {**settings, "rescale": self.rescale, "mean": self.mean, "std": self.std, "decoder": DECODER}


def _channels(values: Any) -> list[float]:
    """One number for each channel, or one for all of them; raises ValueError for anything else."""
    found = [float(values)] * 3 if isinstance(values, int | float) else [float(value) for value in values]
    if len(found) != 3 or not all(map(math.isfinite, found)):
        raise ValueError(f"expected a number for each of 3 channels, got {values}")
    return found
