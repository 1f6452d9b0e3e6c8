"""params.yaml in, frozen checked sections out; a stage gets only the keys that dvc.yaml lists for it.

schema       what the file may hold          reading      the file, its faults named, keys changed from a command line
stage_view   one stage's part of it          `python -m pipeline.params [key=value ...]` checks the file
"""

from pipeline.params.reading import check, load, override, read_yaml, validated
from pipeline.params.schema import (
    Columns,
    Data,
    Dataset,
    HeldOut,
    LanguageModel,
    Member,
    Params,
    Part,
    Projector,
    Section,
    Tokenize,
    Training,
    Vision,
)
from pipeline.params.stage_view import StageParams, load_for_stage

__all__ = [
    "Columns",
    "Data",
    "Dataset",
    "HeldOut",
    "LanguageModel",
    "Member",
    "Params",
    "Part",
    "Projector",
    "Section",
    "StageParams",
    "Tokenize",
    "Training",
    "Vision",
    "check",
    "load",
    "load_for_stage",
    "override",
    "read_yaml",
    "validated",
]
