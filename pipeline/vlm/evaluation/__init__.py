"""A model and held-out rows in, figures out: loss, answers and what they are worth, and the blind control.

loss       loss, and the likelihood of each token     questions   supervised turns as questions     answering   greedy answers
metrics    how an answer is compared                  corpus      CIDEr, yes and no                 choices     multiple choice
choosing   which metrics fit                          sources     parts of a mix
predictions   every answer kept                       summary     what they come to                 heldout     on the way
"""

from pipeline.vlm.evaluation.answering import Answering, answer_questions
from pipeline.vlm.evaluation.choices import choose, find_options
from pipeline.vlm.evaluation.choosing import choose_metrics
from pipeline.vlm.evaluation.corpus import Cider, YesNo
from pipeline.vlm.evaluation.heldout import Heldout, write_losses
from pipeline.vlm.evaluation.loss import heldout_loss, log_likelihoods
from pipeline.vlm.evaluation.predictions import make_table, writing_tables
from pipeline.vlm.evaluation.questions import Question, describe, find_questions, references_of, row_windows
from pipeline.vlm.evaluation.sources import source_names
from pipeline.vlm.evaluation.summary import summarise

__all__ = [
    "Answering",
    "Cider",
    "Heldout",
    "Question",
    "YesNo",
    "answer_questions",
    "choose",
    "choose_metrics",
    "describe",
    "find_options",
    "find_questions",
    "heldout_loss",
    "log_likelihoods",
    "make_table",
    "references_of",
    "row_windows",
    "source_names",
    "summarise",
    "write_losses",
    "writing_tables",
]
