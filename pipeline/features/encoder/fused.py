"""Several frozen encoders as one: their patch features joined in the channel. Each has a store of its own.

The grids must be equal, so that the channels of a token are about one place; each encoder sees pixels of its own size.
"""

from collections.abc import Sequence
from itertools import product
from math import isqrt, prod
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

from pipeline.core import PipelineError, merged_tokens
from pipeline.core.grid import FACTORS
from pipeline.core.loading import read_pretrained
from pipeline.features.encoder.encoder import Encoder
from pipeline.features.encoder.preprocess import Preprocessor
from pipeline.features.encoder.tower import ANY_SIZE
from pipeline.params import Member, Vision
from pipeline.records import decode


class FusedEncoder:
    """As `Encoder` to whoever asks for features: float16 [I, P, Dv], Dv the sum of the `members`' widths, in their order.

    Pixels of a picture are uint8 [bytes], those of all members behind each other. Raises `PipelineError` for unequal grids.
    """

    def __init__(self, members: Sequence[Encoder]) -> None:
        self.members = list(members)
        first = self.members[0]
        self.name, self.device, self.batch = " + ".join(each.name for each in self.members), first.device, first.batch
        self.tokens = common_tokens([(each.name, each.tokens, each.pool) for each in self.members])
        self.width = sum(each.width for each in self.members)
        self.pixel_shape: tuple[int, ...] = (sum(prod(each.pixel_shape) for each in self.members),)

    def preprocess(self, data: bytes, *, where: str) -> np.ndarray:
        """Image bytes, decoded once -> pixels."""
        picture = decode(data, where=where)
        return np.concatenate([each.preprocess.pixels(picture).reshape(-1) for each in self.members])

    def encode(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """uint8 [I, bytes] -> float16 [I, P, Dv] on the encoders' device."""
        shapes = [each.pixel_shape for each in self.members]
        parts = pixels.split([prod(shape) for shape in shapes], dim=1)
        found = [
            each.encode(part.reshape(-1, *shape), names) for each, part, shape in zip(self.members, parts, shapes, strict=True)
        ]
        return torch.cat(found, dim=2)

    def encode_files(self, files: Sequence[bytes], names: Sequence[str]) -> torch.Tensor:
        """Image files -> patch features float16 [I, P, Dv]."""
        if not files:
            return torch.empty(0, self.tokens, self.width, dtype=torch.float16, device=self.device)
        pixels = np.stack([self.preprocess(data, where=name) for data, name in zip(files, names, strict=True)])
        return self.encode(torch.from_numpy(pixels), names)

    def drop_tower(self) -> None:
        """As `Encoder.drop_tower`."""
        for each in self.members:
            each.drop_tower()

    def row_spec(self) -> dict[str, Any]:
        """Everything that decides a joined row's bits."""
        return {"members": [each.row_spec() for each in self.members]}


def load_member(member: Member, *, device: torch.device, batch: int) -> Encoder:
    """The frozen encoder that one of `vision.members` names."""
    return Encoder(**member._asdict(), device=device, batch=batch)


def load_encoder(vision: Vision, *, device: torch.device, batch: int) -> Encoder | FusedEncoder:
    """The frozen encoder, or encoders, that the section `vision` of params.yaml names."""
    return join_encoders([load_member(each, device=device, batch=batch) for each in vision.members])


def join_encoders(members: Sequence[Encoder]) -> Encoder | FusedEncoder:
    """One encoder as it is, several as one."""
    return members[0] if len(members) == 1 else FusedEncoder(members)


def shape_of(member: Member) -> tuple[int, int]:
    """P and Dv of an encoder, from its configuration alone."""
    config: Any = read_pretrained(AutoConfig, member.model, where="vision.model", revision=member.revision)
    config = getattr(config, "vision_config", config)
    side = Preprocessor(member.model, member.revision).size()[0] if config.model_type in ANY_SIZE else config.image_size
    patches = (side // config.patch_size) ** 2
    return merged_tokens(patches, member.pool, where="vision.pool", off="vision.pool: 1"), config.hidden_size


def describe_encoders(vision: Vision, encoder: Encoder | FusedEncoder) -> dict[str, Any]:
    """What a checkpoint's manifest says of its encoder or encoders."""
    keys = ("model", "revision", "layer", "precision")
    parts = [
        {**{key: getattr(section, key) for key in keys}, "spec": member.spec()}
        for section, member in zip(vision.members, encoder.members, strict=True)
    ]
    return parts[0] if len(parts) == 1 else {"members": parts}


def common_tokens(found: Sequence[tuple[str, int, int]]) -> int:
    """P of encoders with equal grids; of each its name, its P and its `vision.pool`.

    Raises `PipelineError` with every grid and what would make them equal.
    """
    tokens = {count for _, count, _ in found}
    if len(tokens) == 1:
        return tokens.pop()
    sides = [(name, isqrt(count), pool) for name, count, pool in found]
    grids = " and ".join(f"{name} gives {side} × {side} patches" for name, side, _ in sides)
    if any(side * side != count for (_, side, _), (_, count, _) in zip(sides, found, strict=True)):
        grids = " and ".join(f"{name} gives {count} patches" for name, count, _ in found)
    pools = [pool for pool in product(FACTORS, repeat=len(found)) if _fit(sides, pool)]
    if pools:
        remedy = f"set vision.pool: {list(min(pools, key=sum))}"
    else:
        side = min(side for _, side, _ in sides)
        remedy = f"no vision.pool makes them equal: take checkpoints of equal grids, of {side} × {side} patches for example"
    raise PipelineError(f"{grids}, and only equal grids can be joined", where="vision.model", remedy=remedy)


def _fit(sides: Sequence[tuple[str, int, int]], pools: Sequence[int]) -> bool:
    """Whether these pools give every encoder the same grid."""
    whole = [side * pool for _, side, pool in sides]
    return len({side / pool for side, pool in zip(whole, pools, strict=True)}) == 1 and not any(
        side % pool for side, pool in zip(whole, pools, strict=True)
    )
