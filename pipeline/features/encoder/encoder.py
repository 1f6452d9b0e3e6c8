"""The frozen vision encoder: image bytes -> pixels -> patch features, the same way in every stage.

Reads the checkpoints that `tower` lists, in Transformers' format; patches P and width Dv come from it. I is a number of images.
A feature row's bits must not depend on who shares its batch, so the encoder always sees full batches of one size.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.core import PipelineError, merged_tokens
from pipeline.core.attention import GROUPED
from pipeline.core.devices import DTYPES, autocast, pick_precision
from pipeline.core.grid import mean_of_blocks
from pipeline.features.encoder.encoding import Encoding
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.features.encoder.tower import keep_layers, load_tower, side_of
from pipeline.features.resampling import resampling
from pipeline.features.store.row_format import (
    Float16Format,
    Int8Format,
    RowFormat,
    calibration_pictures,
    constants_digest,
    measure_constants,
)

FEATURES_VERSION = 4  # part of every fingerprint: raise it when pipeline/features/encoder computes other numbers

# What decides a feature in some family, beside the weights and the numbers that all have.
SWITCHES = ("mlp_ratio", "num_register_tokens", "rope_parameters", "rope_theta", "use_swiglu_ffn", "use_gated_mlp")


class Encoder(nn.Module):
    """A frozen vision tower: pixels uint8 [I, 3, side, side] -> patch features float16 [I, P, Dv], the CLS token dropped.

    Args:
        model, revision: a folder or a hub id in Transformers' format, of a family that `tower` lists.
        layer: index into the hidden states; -1 is the tower's last hidden state.
        precision: auto, float32, bfloat16 or float16 (autocast over float32 weights).
        storage: float16 or int8; `encode` rounds as the store does, so live and stored features are the same.
        pool: pool x pool neighbouring patches are stored as their mean, so P and the store are pool² times smaller.
        batch: images per call of the tower; smaller batches are filled up.

    Raises `PipelineError` for another model family, missing weights or an impossible layer.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str = "",
        layer: int = -1,
        precision: str = "auto",
        storage: str = "float16",
        pool: int = 1,
        device: torch.device,
        batch: int = 64,
    ) -> None:
        super().__init__()
        self.name, self.revision, self.layer, self.batch, self.device = model, revision, layer, batch, device
        self.precision = pick_precision(precision, device)
        self.preprocess = Preprocessor(model, revision)
        self._attention = GROUPED if device.type == "cpu" else "sdpa"
        self.tower = load_tower(model, revision, self._attention).requires_grad_(False).eval().to(device)
        config = self.tower.config
        self.side = side_of(config, self.preprocess.size(), model)
        self._patches, self.width, self.pool = (self.side // config.patch_size) ** 2, config.hidden_size, pool
        self.tokens = merged_tokens(self._patches, pool, where="vision.pool", off="vision.pool: 1")
        if not -config.num_hidden_layers - 1 <= layer <= config.num_hidden_layers:
            raise PipelineError(
                f"vision.layer is {layer}; {model} has {config.num_hidden_layers} layers", remedy="set vision.layer"
            )
        self._weights, self._config, self._rounded = _weights_digest(self.tower), _plain_config(config), False
        self._error: float | None = None
        self._state = layer if layer >= 0 else config.num_hidden_layers + 1 + layer
        if layer != -1:
            keep_layers(self.tower, self._state)
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (self.preprocess.mean, self.preprocess.std))

        self.row_format = self._row_format(storage)

    def _row_format(self, storage: str) -> RowFormat:
        if storage == "float16":
            return Float16Format(self.tokens, self.width)
        pictures = torch.from_numpy(calibration_pictures(self.side))
        tower = self.tower.to("cpu")  # the constants name the store: no other device may give other ones
        features = torch.cat([self._forward(tower, part, "float32") for part in pictures.split(4)])
        self.tower.to(self.device)
        return Int8Format(self.tokens, *measure_constants(features))

    @torch.inference_mode()
    def relative_error(self) -> float:
        """How far stored rows are from float32 features, as a share of their norm, over fixed pictures.

        Cheapest before anything is encoded: afterwards the float32 weights have to be read again.
        """
        if self._error is None:
            pictures = torch.from_numpy(calibration_pictures(self.side, count=4))
            exact = self.exact_tower() if self._rounded else self.tower
            wanted = self._forward(exact, pictures, "float32").cpu()
            self._round_products()
            stored = [
                self.row_format.encode(self._forward(self.tower, part, self.precision)) for part in pictures.split(self.batch)
            ]
            found = self.row_format.decode(torch.cat(stored)).float().cpu()
            self._error = float(f"{float((found - wanted).norm() / wanted.norm()):.2g}")
        return self._error

    def exact_tower(self) -> PreTrainedModel:
        """The tower anew from its files, with none of the rounding of the one that encodes, and open to gradients."""
        tower = load_tower(self.name, self.revision, self._attention).requires_grad_(False).eval().to(self.device)
        if self.layer != -1:
            keep_layers(tower, self._state)
        return tower

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Of a picture's pixels, as `encode` takes them."""
        return 3, self.side, self.side

    @property
    def members(self) -> list["Encoder"]:
        """The encoders that this one is made of: itself. See `FusedEncoder`."""
        return [self]

    def drop_tower(self) -> None:
        """Give the weights' memory back where only `spec`, `tokens` and `width` are still asked for."""
        del self.tower

    def encode(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """uint8 [I, 3, side, side] -> float16 [I, P, Dv] on the encoder's device; `names` say whose row is not finite."""
        return self.row_format.decode(self.encode_rows(pixels, names))

    @torch.inference_mode()
    def encode_rows(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """As `encode`, in the form that the store holds: [I, *row_format.shape]."""
        starts = range(0, len(pixels), self.batch)
        found = [self.begin(pixels[start : start + self.batch], names[start : start + self.batch]) for start in starts]
        return torch.cat([encoding.checked() for encoding in found])

    @torch.inference_mode()
    def begin(self, pixels: torch.Tensor, names: Sequence[str]) -> Encoding:
        """Rows of at most `batch` pictures, not waited for; a GPU copies `pixels` by itself where they are pinned."""
        self._round_products()
        count, pixels = len(pixels), pixels.to(self.tower.device, non_blocking=True)
        if count < self.batch:
            pixels = torch.cat([pixels, pixels.new_zeros(self.batch - count, *pixels.shape[1:])])
        features = self._forward(self.tower, pixels, self.precision)[:count]
        finite = torch.isfinite(features.to(torch.float16)).flatten(1).all(1)
        return Encoding(self.row_format.encode(features), finite, names)

    def _round_products(self) -> None:
        """Hold the weights of matrix products in the format that autocast would round them to anew in every call."""
        if self._rounded:
            return
        dtype = DTYPES[self.precision]
        for module in self.tower.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(dtype)
        self._rounded = True

    @torch.inference_mode()
    def _forward(self, tower: PreTrainedModel, pixels: torch.Tensor, precision: str) -> torch.Tensor:
        """[I, P, Dv] in the precision of the computation, patch tokens only."""
        return self.trace(tower, pixels, precision)[0]

    def trace(self, tower: PreTrainedModel, pixels: torch.Tensor, precision: str, **options: Any) -> tuple[torch.Tensor, Any]:
        """Pixels [I, 3, side, side] -> patch features [I, P, Dv], not yet rounded as the store does, and the tower's whole output.

        `options` are the tower's own, such as `output_attentions`.
        """
        device = tower.device
        values = (pixels.to(device).float() * self.preprocess.rescale - self._mean.to(device)) / self._std.to(device)
        with autocast(precision, device):
            output = tower(values, output_hidden_states=self.layer != -1, **options)
        hidden = output.last_hidden_state if self.layer == -1 else output.hidden_states[self._state]
        patches = hidden[:, hidden.shape[1] - self._patches :]
        return (patches if self.pool == 1 else mean_of_blocks(patches.float(), self.pool)), output

    def encode_files(self, files: Sequence[bytes], names: Sequence[str]) -> torch.Tensor:
        """Image files -> patch features float16 [I, P, Dv]: decode, resize, encode."""
        if not files:
            return torch.empty(0, self.tokens, self.width, dtype=torch.float16, device=self.device)
        pixels = np.stack([self.preprocess(data, where=name) for data, name in zip(files, names, strict=True)])
        return self.encode(torch.from_numpy(pixels), names)

    def spec(self) -> dict[str, Any]:
        """Everything that decides a feature's value but for rounding: what a model is trained with and must be asked with."""
        stored = {"storage": "int8", "constants": constants_digest(self.row_format.constants)} if self.row_format.constants else {}
        pooled = {"pool": self.pool} if self.pool > 1 else {}
        return {
            **stored,
            **pooled,
            **resampling(),
            "features": FEATURES_VERSION,
            "weights": self._weights,
            "config": self._config,
            "preprocess": self.preprocess.describe(),
            "layer": self.layer,
            "precision": self.precision,
            "tokens": self.tokens,
            "width": self.width,
        }

    def row_spec(self) -> dict[str, Any]:
        """Everything that decides a row's bits; its hash names the cached features.

        As `spec`, and on a GPU the images of a call: libraries take another kernel for another size, which sums in another order.
        """
        return self.spec() | ({} if self.device.type == "cpu" else {"batch": self.batch})


def _weights_digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _plain_config(config: Any) -> dict[str, Any]:
    """The numbers that shape the computation, without names and versions."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
    epsilon = config.layer_norm_eps if hasattr(config, "layer_norm_eps") else config.rms_norm_eps
    found = {**{key: getattr(config, key) for key in keys if hasattr(config, key)}, "act": config.hidden_act, "eps": epsilon}
    if config.model_type in ("clip_vision_model", "siglip_vision_model"):
        return found
    return {**found, "family": config.model_type, **{key: getattr(config, key) for key in SWITCHES if hasattr(config, key)}}
