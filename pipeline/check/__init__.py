"""What a data set holds and what is wrong with it, before anything is computed: `python -m pipeline.check`.

survey      one pass over a data set's rows, in constant memory, into a `Report`
pictures    every distinct picture read, its header checked, decoded
lengths     rows as the language model will see them: token counts, what is cut or refused
costs       features on disk and extraction time; training, timing   what the training stages take, timed on a sample (`sample`)
preflight   what stands in the way of a run, before any of it; the stages begin with it
terminal    a report for the terminal; `page` one HTML file of all reports
"""

from pipeline.check.command import extraction_line, load_builder, measured_rate
from pipeline.check.costs import PictureTime, Shape, context_of, encoder_shape, time_pictures
from pipeline.check.counting import Keys
from pipeline.check.facts import Model, seconds_text, size_text
from pipeline.check.pictures import thumbnail
from pipeline.check.preflight import Project, check_tracking
from pipeline.check.sample import Size, measure_size, sample_pictures, write_sample, write_store
from pipeline.check.seconds import Rates, Work, encodings, extraction_seconds, live_seconds, stored_seconds
from pipeline.check.survey import Report, Settings, Subject, survey
from pipeline.check.terminal import open_console, show
from pipeline.check.timing import sampled_run, wait_for
from pipeline.check.training import STAGES, make_part, make_work, training_costs

__all__ = [
    "STAGES",
    "Keys",
    "Model",
    "PictureTime",
    "Project",
    "Rates",
    "Report",
    "Settings",
    "Shape",
    "Size",
    "Subject",
    "Work",
    "check_tracking",
    "context_of",
    "encoder_shape",
    "encodings",
    "extraction_line",
    "extraction_seconds",
    "live_seconds",
    "load_builder",
    "make_part",
    "make_work",
    "measure_size",
    "measured_rate",
    "open_console",
    "sample_pictures",
    "sampled_run",
    "seconds_text",
    "show",
    "size_text",
    "stored_seconds",
    "survey",
    "thumbnail",
    "time_pictures",
    "training_costs",
    "wait_for",
    "write_sample",
    "write_store",
]
