"""Conversations in, token ids out: with the places of the images and the spans that are supervised, as an Arrow table.

builder        one tokenizer and its chat template         prompts        ids, spans and image positions put together
scaffold       what the template writes around contents     template       it is rendered, within limits, by `sandbox`
borders        where both may be encoded apart              whole, marking where not: the whole text, and what stands where
tokenization   a data set's records -> its table           token_table    the table, read through a memory map
"""

from pipeline.text.builder import PromptBuilder, template_faults
from pipeline.text.prompts import Prompt
from pipeline.text.template import DATE
from pipeline.text.token_table import SCHEMA, Row, TokenTable, write_tokens
from pipeline.text.tokenization import TOO_LONG, RowFilter, RowTokenizer, Summary, build_or_refuse, fit_length, tokenize

__all__ = [
    "DATE",
    "SCHEMA",
    "TOO_LONG",
    "Prompt",
    "PromptBuilder",
    "Row",
    "RowFilter",
    "RowTokenizer",
    "Summary",
    "TokenTable",
    "build_or_refuse",
    "fit_length",
    "template_faults",
    "tokenize",
    "write_tokens",
]
