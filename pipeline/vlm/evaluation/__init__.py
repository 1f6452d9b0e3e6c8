"""A model and held-out rows in, figures out: loss, exact-match accuracy, and that of the blind control."""

from pipeline.vlm.evaluation.accuracy import Answering, answer_accuracy
from pipeline.vlm.evaluation.heldout import Heldout
from pipeline.vlm.evaluation.loss import heldout_loss

__all__ = ["Answering", "Heldout", "answer_accuracy", "heldout_loss"]
