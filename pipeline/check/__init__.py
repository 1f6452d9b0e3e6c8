"""What a data set holds and what is wrong with it, before anything is computed: `python -m pipeline.check`.

survey      one pass over a data set's rows, in constant memory, into a `Report`
pictures    every distinct picture read, its header checked, decoded
lengths     rows as the language model will see them: token counts, what is cut or refused
costs       features on disk and extraction time
preflight   what stands in the way of a run, before any of it; the stages begin with it
terminal    a report for the terminal; `page` one HTML file of all reports
"""

from pipeline.check.command import extraction_cost, load_builder
from pipeline.check.costs import PictureTime, Shape, context_of, encoder_shape, time_pictures
from pipeline.check.counting import Keys
from pipeline.check.facts import Model, seconds_text, size_text
from pipeline.check.pictures import thumbnail
from pipeline.check.preflight import Project, check_tracking
from pipeline.check.survey import Report, Settings, Subject, survey
from pipeline.check.terminal import open_console, show

__all__ = [
    "Keys",
    "Model",
    "PictureTime",
    "Project",
    "Report",
    "Settings",
    "Shape",
    "Subject",
    "check_tracking",
    "context_of",
    "encoder_shape",
    "extraction_cost",
    "load_builder",
    "open_console",
    "seconds_text",
    "show",
    "size_text",
    "survey",
    "thumbnail",
    "time_pictures",
]
