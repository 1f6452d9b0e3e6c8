"""Rows as the language model will see them: their tokens, what `tokenize.too_long` makes of them, what is supervised."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.check.counting import Spread
from pipeline.params import Tokenize
from pipeline.records import PLACEHOLDER, BadRow, Record, bad_record
from pipeline.text import TOO_LONG, Prompt, PromptBuilder, build_or_refuse, fit_length


@dataclass(slots=True)
class LengthCounts:
    """Lengths of all rows, before any cut; tokens, supervised and rows of those that are kept. Letters without a tokenizer."""

    lengths: Spread = field(default_factory=Spread)
    rows: int = 0
    tokens: int = 0
    supervised: int = 0
    supervised_rows: int = 0
    cut: int = 0
    refused: int = 0
    refused_first: str = ""
    steering: int = 0  # rows whose text spells a control token
    spelled: int = 0  # rows whose system or assistant text has the placeholder in it


class LengthCheck:
    """Counts records' tokens in batches.

    Args:
        builder: makes the prompts; None = no tokenizer, so letters are counted and nothing is cut.
        limits: the section `tokenize` of params.yaml.
    """

    def __init__(self, builder: PromptBuilder | None, limits: Tokenize) -> None:
        self.counts = LengthCounts()
        self.builder, self._limits = builder, limits
        spellings = sorted(builder.control, key=len, reverse=True) if builder else []
        spellings = [text for text in spellings if text != PLACEHOLDER]
        self._control = re.compile("|".join(map(re.escape, spellings))) if spellings else None

    def check(self, records: Sequence[Record]) -> list[Prompt | BadRow | None]:
        """For each record what will be trained on; a `BadRow` where it cannot be; None where it is left out, or unknown."""
        for record in records:
            self._look_at_text(record)
        if self.builder is None:
            self.counts.lengths.add([_letters(record) for record in records])
            self.counts.rows += len(records)
            return [None] * len(records)
        prompts = list(build_or_refuse(self.builder, records))
        made = [
            self._fit(self.builder, record, prompt) if isinstance(prompt, Prompt) else prompt
            for record, prompt in zip(records, prompts, strict=True)
        ]
        self._count([prompt for prompt in prompts if isinstance(prompt, Prompt)], [p for p in made if isinstance(p, Prompt)])
        return made

    def _fit(self, builder: PromptBuilder, record: Record, prompt: Prompt) -> Prompt | BadRow | None:
        limits = self._limits
        fitted, reason = fit_length(prompt, image_tokens=builder.tokens, max_tokens=limits.max_tokens, too_long=limits.too_long)
        self.counts.cut += fitted is not None and fitted is not prompt
        if fitted is None and limits.too_long == "stop":
            return bad_record(record, reason, f"{TOO_LONG}, or set tokenize.too_long")
        if fitted is None:
            self.counts.refused += 1
            self.counts.refused_first = self.counts.refused_first or f"{record.where}: {reason}"
        return fitted

    def _count(self, prompts: list[Prompt], kept: list[Prompt]) -> None:
        counts, supervised = self.counts, [sum(end - start for start, end in prompt.spans) for prompt in kept]
        counts.lengths.add([len(prompt.ids) for prompt in prompts])
        counts.rows += len(kept)
        counts.tokens += sum(len(prompt.ids) for prompt in kept)
        counts.supervised += sum(supervised)
        counts.supervised_rows += sum(map(bool, supervised))

    def _look_at_text(self, record: Record) -> None:
        texts = [(turn.role, part) for turn in record.turns for part in turn.parts if isinstance(part, str)]
        self.counts.spelled += any(role != "user" and PLACEHOLDER in text for role, text in texts)
        self.counts.steering += self._control is not None and any(self._control.search(text) for _, text in texts)


def _letters(record: Record) -> int:
    return sum(len(part) for turn in record.turns for part in turn.parts if isinstance(part, str))
