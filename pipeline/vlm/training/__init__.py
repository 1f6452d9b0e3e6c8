"""Params and token tables in, a trained checkpoint and its figures out: one loop for both training stages.

stage           what a training stage does, step by step          assembly, parts   what it is put together from
loop            the training loop                                 optimizer         AdamW and its learning rate
checkpointing   when the state is saved                           state             the state on disk
callbacks       what is called after a step                       progress          the progress line
alike           that all processes have the same inputs
"""

from pipeline.vlm.training.assembly import TrainingRun, assemble
from pipeline.vlm.training.callbacks import Callbacks
from pipeline.vlm.training.loop import train
from pipeline.vlm.training.stage import train_stage

__all__ = ["Callbacks", "TrainingRun", "assemble", "train", "train_stage"]
