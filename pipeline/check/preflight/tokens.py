"""Tokenizer, chat template, image token and lengths, against the language model that will see them."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project
from pipeline.core import PipelineError
from pipeline.records import Turn
from pipeline.text import template_faults

TALK = [Turn("user", ("What is this?",)), Turn("assistant", ("A cat.",)), Turn("user", ("Which?",)), Turn("assistant", ("Black.",))]


def check_tokenizer(project: Project) -> Iterator[Finding]:
    """That the chat template can be taken apart, every id has an embedding, and the image token has no other task."""
    llm = project.params.llm
    if project.is_made_later(llm.model) or isinstance(project.language_config, PipelineError):
        return
    if faults := template_faults(llm):
        yield from map(Finding.of, faults)
        return
    builder = project.builder
    if isinstance(builder, PipelineError):
        return
    vocabulary: dict[str, int] = builder.tokenizer.get_vocab()
    if project.model is not None:
        table: Any = project.model.get_input_embeddings()
        rows = int(table.weight.shape[0])
        if beyond := sorted((number, token) for token, number in vocabulary.items() if number >= rows):
            first, token = beyond[0]
            what = f"the tokenizer has {len(beyond)} tokens without an embedding, first {token!r}, id {first} of {rows} rows"
            remedy = "take the tokenizer it was trained with, or give the model those rows (resize_token_embeddings)"
            yield Finding(what, "llm.model", remedy)
    written = set(builder.build(TALK, trim=False).ids.tolist()) | {builder.end_id}
    if builder.image_id in written:
        task = "ends turns" if builder.image_id == builder.end_id else "is written by the chat template"
        free = [token for token, number in sorted(builder.control.items()) if number not in written]
        remedy = f"choose another, such as {free[0]}" if free else "choose another token of the vocabulary"
        yield Finding(f"{llm.image_token!r} {task}, so it cannot stand for a picture", "llm.image_token", remedy)


def check_lengths(project: Project) -> Iterator[Finding]:
    """Longest rows against the positions that the language model has; beyond a table of them there is nothing."""
    most, answer = project.params.tokenize.max_tokens, project.params.evaluate.max_new_tokens
    if project.patches >= most:
        yield Finding(f"an image takes {project.patches} tokens, a row at most {most}", "tokenize.max_tokens", "raise it")
    model = project.model
    positions = positions_of(model.config) if model is not None else None
    if model is None or positions is None:
        return
    name = project.params.llm.model
    if has_table(model, positions):
        if most + answer - 1 > positions:
            yield Finding(
                f"rows of {most} tokens and answers of {answer} are longer than the {positions} positions that {name} has",
                "tokenize.max_tokens",
                f"set tokenize.max_tokens: {positions - answer + 1} or less",
            )
    elif most > positions:
        yield Finding(
            f"rows of up to {most} tokens, {name} was made for {positions}",
            "tokenize.max_tokens",
            f"set it to {positions}",
            note=True,
        )


def positions_of(config: Any) -> int | None:
    """The most tokens that a language model was made for; None where its configuration does not say."""
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def has_table(model: Any, positions: int) -> bool:
    """Whether positions are rows of a table, learned or computed, or of a mask that is kept; those of rotations have no end."""
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    if any(positions <= table.num_embeddings <= positions + 4 for table in tables):
        return True
    return any(positions in buffer.shape[-2:] or buffer.shape[:1] == (positions,) for buffer in model.buffers() if buffer.ndim > 1)
