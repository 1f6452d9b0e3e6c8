"""A training run's numbers: what is learnt follows from its `Schedule`, how fast from its `Execution`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """The numbers of a training run (see the sections `pretrain` and `sft` of params.yaml)."""

    epochs: int
    batch_size: int
    micro_tokens: int
    lr: float
    warmup: float
    min_lr: float
    weight_decay: float
    clip_norm: float
    seed: int


@dataclass(frozen=True, slots=True)
class Execution:
    """How a run is computed; its results are the same to rounding.

    Attributes:
        name: what its progress is called.
        threads: how many load examples ahead.
        sharded: each of several processes holds a part of every weight (see `pipeline.vlm.model.sharding`).
        packed: examples of a micro-batch stand end to end in one row (see `pipeline.vlm.batches.packing`); the model must
            use the attention of `pipeline.vlm.model.packed_attention`.
        compiled: decoder layers run compiled (see `pipeline.vlm.model.compiling`).
    """

    name: str = "train"
    threads: int = 1
    sharded: bool = False
    packed: bool = False
    compiled: bool = False
