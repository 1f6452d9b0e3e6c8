"""A model and held-out rows in, figures out: loss, answers and what they are worth, and the blind control.

loss       loss, and the likelihood of each token     questions     supervised turns as questions
accuracy   greedy answers to them                     metrics       how an answer is compared
predictions   every answer kept, and summed up        heldout       losses while a run trains
"""

from pipeline.vlm.evaluation.accuracy import Answering, answer_accuracy
from pipeline.vlm.evaluation.heldout import Heldout
from pipeline.vlm.evaluation.loss import heldout_loss, log_likelihoods
from pipeline.vlm.evaluation.predictions import make_table, summarise, write_table
from pipeline.vlm.evaluation.questions import find_questions

__all__ = [
    "Answering",
    "Heldout",
    "answer_accuracy",
    "find_questions",
    "heldout_loss",
    "log_likelihoods",
    "make_table",
    "summarise",
    "write_table",
]
