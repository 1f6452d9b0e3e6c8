"""A conversation's turns -> token ids, supervised spans and image positions, for one tokenizer and its chat template.

The ids are those of `apply_chat_template`, and what is supervised (the assistant's words and its end-of-turn token) and where
images stand is known by construction, never searched for. Where the tokenizer sees a border between template and contents, both
are encoded apart, the template once per order of roles (`prompts`); where it looks across, the whole text is (`whole`). Where the
template looks into a text, that conversation is rendered by it (`marking`). A content never yields a control token.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.core import ARTEFACT, BAD_ROWS, PipelineError, brief
from pipeline.core.loading import read_pretrained
from pipeline.params import LanguageModel
from pipeline.records import Turn
from pipeline.text.borders import Borders
from pipeline.text.marking import THOUGHTS, contents
from pipeline.text.prompts import ID, Encoded, Pattern, Prompt, Prompts, flatten, lay_out
from pipeline.text.scaffold import Scaffold
from pipeline.text.template import DATE, OTHERS, Template
from pipeline.text.whole import WholeEncoder

TEXT_VERSION = 1  # part of every token table's spec: raise it when pipeline/text gives other ids


TALK = [
    Turn("user", ("What is this?",)),
    Turn("assistant", ("It is a cat.",)),
    Turn("user", ("Which colour?",)),
    Turn("assistant", ("Black.",)),
]
ODD_TALKS = [
    [Turn("user", ("  What is\n\nthis? ",)), Turn("assistant", ('"It" is a 猫.',))],
    [Turn("user", ("(a)",)), Turn("assistant", ("<think>\nHm.\n</think>\n\nA cat.",)), *TALK],
]


class PromptBuilder:
    """Builds prompts for one tokenizer and P placeholder tokens an image.

    Args:
        model, revision: a Transformers folder or hub id whose tokenizer has a chat template.
        image_token: an existing token of its vocabulary that stands in for image features.
        tokens: placeholders an image (P).
        date: YYYY-MM-DD, what a template that writes today's date is told.

    Raises `PipelineError` when the template is missing or its ids cannot be had, or the image token is not one token.
    """

    def __init__(self, model: str, *, revision: str = "", image_token: str, tokens: int, date: str = DATE) -> None:
        self.tokenizer = _load_tokenizer(model, revision)
        self.model, self.tokens = model, tokens
        vocabulary = self.tokenizer.get_vocab()
        if image_token not in vocabulary:
            raise PipelineError(
                f"{image_token!r} is not a token of {model}", where="llm.image_token", remedy=_reserved(self.tokenizer)
            )
        self.image_token, self.image_id, self.date = image_token, vocabulary[image_token], date
        try:
            self._scaffold = _make_scaffold(self.tokenizer, model, date)
            self._prepare(vocabulary)
        except PipelineError as error:
            raise PipelineError(error.what, where=model, remedy=error.remedy or OTHERS, code=ARTEFACT) from None

    def _prepare(self, vocabulary: dict[str, int]) -> None:
        image_token, tokens = self.image_token, self.tokens
        self.options = self._scaffold.options
        self.control = _control_tokens(self.tokenizer, image_token, self._scaffold.written)
        self._scaffold.avoid(list(self.control))
        self._is_control = np.zeros(max(vocabulary.values()) + 1, bool)
        self._is_control[list(self.control.values())] = True
        self._content = _content_tokenizer(self.tokenizer, set(self.control))
        self._image = self._bytes((self.image_id,) * tokens)
        self._borders = Borders(self.tokenizer, image_token)
        self._pattern = lru_cache(maxsize=4096)(self._make_pattern)
        self.end_id = int(self.build(TALK[:2]).ids[-1])
        self._check(TALK)

    def check(self) -> None:
        """Raises `PipelineError` unless odd texts get the template's own ids too; costs a second copy of the tokenizer."""
        for talk in ODD_TALKS:
            try:
                self._check(talk)
            except PipelineError as error:
                if error.code != BAD_ROWS:  # one that the template refuses would be a bad row
                    raise

    @cached_property
    def _whole(self) -> WholeEncoder:
        return WholeEncoder(self.tokenizer, self.control, (self.image_token, self.image_id), self.tokens)

    def _make_pattern(self, roles: tuple[str, ...], *, trim: bool, generate: bool) -> Pattern | None:
        """The template for these roles as ids; None where the tokenizer must see template and contents together."""
        pieces = self._scaffold.pieces(roles, generate)
        if pieces is None or not self._borders.are_seen(pieces):
            return None
        first, *others = (self.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces)
        closing = [
            self._end_of_turn(ids) if role == "assistant" and not generate else 0 for role, ids in zip(roles, others, strict=True)
        ]
        if trim and any(closing):  # what follows the last supervised token teaches nothing
            last = max(number for number, count in enumerate(closing) if count)
            others[last:] = [others[last][: closing[last]]]
        return Pattern(self._bytes(first), tuple(zip(map(self._bytes, others), closing, strict=False)))

    @staticmethod
    def _bytes(ids: Sequence[int]) -> bytes:
        return np.array(ids, ID).tobytes()

    def _check(self, turns: Sequence[Turn]) -> None:
        """The ids must be the template's own, and training must see the prefix that generation will."""
        (whole,) = self._scaffold.template.render([(contents(turns), False)], self.options)
        expected = self.tokenizer.encode(whole, add_special_tokens=False)
        built = self.build(turns, trim=False).ids.tolist()
        if built != expected:
            at = next((i for i, (a, b) in enumerate(zip(built, expected, strict=False)) if a != b), min(len(built), len(expected)))
            raise PipelineError(
                f"its tokenizer and chat template cannot be taken apart: ids differ at {at}", where=self.model, code=ARTEFACT
            )
        prompt, trained = self.build_question(turns[:-1]), self.build(turns)
        if prompt.ids.tolist() != trained.ids[: trained.spans[-1][0]].tolist():
            raise PipelineError(
                "its chat template's generation prompt has other ids than training would show", where=self.model, code=ARTEFACT
            )

    def encode(self, texts: list[str]) -> Encoded:
        """Contents -> ids, while other threads go on; control tokens in a text come out as plain text.

        Raises `PipelineError` for a text that has no other spelling than a control token.
        """
        encoded = flatten([part.ids for part in self._content.encode_batch_fast(texts, add_special_tokens=False)])
        wrong = np.flatnonzero(self._is_control[encoded.ids])
        if len(wrong):
            bad = texts[int(np.searchsorted(encoded.bounds, wrong[0], side="right")) - 1]
            raise PipelineError(
                f"the text {brief(ValueError(bad), limit=60)!r} yields a control token", where=self.model, code=BAD_ROWS
            )
        return encoded

    def build_batch(self, conversations: Sequence[Sequence[Turn]], *, trim: bool = True) -> Prompts:
        """Prompts for training; the tokenizer sees all texts of the batch at once.

        Each ends with the assistant's last end-of-turn token (`trim`), or with the template's tail.
        """
        return self._build(conversations, trim=trim, generate=False)

    def build(self, turns: Sequence[Turn], *, trim: bool = True) -> Prompt:
        """One prompt, as `build_batch` makes it."""
        return self.build_batch([turns], trim=trim)[0]

    def build_question(self, turns: Sequence[Turn]) -> Prompt:
        """A prompt that ends where the assistant's answer begins; nothing in it is supervised."""
        return self._build([turns], trim=False, generate=True)[0]

    def _build(self, conversations: Sequence[Sequence[Turn]], *, trim: bool, generate: bool) -> Prompts:
        """Those that can be are put together from ids, at the price of their contents; others are encoded whole."""
        odd = self._scaffold.odd(conversations)
        patterns = [self._pattern(tuple([turn.role for turn in turns]), trim=trim, generate=generate) for turns in conversations]
        if not odd and all(patterns):
            return self._build_apart(zip(conversations, patterns, strict=True))  # type: ignore[arg-type]
        apart = [None if number in odd else pattern for number, pattern in enumerate(patterns)]
        one = iter(self._build_apart([(turns, pattern) for turns, pattern in zip(conversations, apart, strict=True) if pattern]))
        rest = [number for number, pattern in enumerate(apart) if pattern is None]
        asked, rendered = [conversations[number] for number in rest], [number in odd for number in rest]
        other = iter(self._build_whole(asked, rendered, trim, generate))
        return Prompts.of([next(one) if pattern else next(other) for pattern in apart])

    def _build_apart(self, conversations: Iterable[tuple[Sequence[Turn], Pattern]]) -> Prompts:
        layout = lay_out(conversations, self._image)
        return layout.join(self.encode(layout.texts))

    def _build_whole(self, conversations: list[Sequence[Turn]], odd: list[bool], trim: bool, generate: bool) -> list[Prompt]:
        scripts = []
        for turns, segments in zip(conversations, self._scaffold.segments(conversations, odd, generate), strict=True):
            answering = [turn.role == "assistant" and not generate for turn in turns]
            scripts.append(self._whole.script(segments, self._scaffold.headers(turns, generate), answering, self._scaffold.lead))
        return [
            _as_trained(prompt, turns) for prompt, turns in zip(self._whole.encode(scripts, trim=trim), conversations, strict=True)
        ]

    def _end_of_turn(self, after: Sequence[int]) -> int:
        """How many ids of the piece after an answer belong to it: up to and including its first control token."""
        for count, token in enumerate(after, start=1):
            if token in self.control.values():
                return count
        raise PipelineError("its chat template ends no turn with a control token", where=self.model, code=ARTEFACT)

    @property
    def suppressed(self) -> list[int] | None:
        """Ids that generation must not produce: the image token, unless it is a word of the language too."""
        return [self.image_id] if self.image_id in self.control.values() else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids -> text, control tokens left out."""
        kept = [int(token) for token in ids if int(token) not in self.control.values()]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def dates(self) -> str:
        """Jinja that, before the template, tells it the date of training wherever it is rendered; "" where it writes none."""
        dates = self._scaffold.template.dates
        return f"{{%- macro strftime_now(format) %}}{{{{- {json.dumps(dates)}[format] }}}}{{%- endmacro %}}\n" if dates else ""

    def spec(self) -> dict[str, object]:
        """Everything that decides the ids; kept in every token table and checkpoint."""
        backend = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        spec = {"text": TEXT_VERSION, "tokenizer": backend, "template": template, "image_id": self.image_id, "tokens": self.tokens}
        return spec | ({"date": self.date} if self.dated else {})

    @property
    def dated(self) -> bool:
        """Whether the chat template writes a date, which then belongs to the model."""
        return self._scaffold.template.dated


def template_faults(llm: LanguageModel) -> list[PipelineError]:
    """What stands against the tokenizer and chat template of `llm`: nothing, or the one error that a stage would end with."""
    try:
        PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=1, date=llm.date).check()
    except PipelineError as error:
        return [error]
    return []


def _as_trained(prompt: Prompt, turns: Sequence[Turn]) -> Prompt:
    """The prompt, supervised where its answers are to be trained on."""
    trained = [turn.trained for turn in turns if turn.role == "assistant"]
    if all(trained) or not prompt.spans:
        return prompt
    return replace(prompt, spans=tuple(span for span, wanted in zip(prompt.spans, trained, strict=True) if wanted))


def _load_tokenizer(model: str, revision: str) -> PreTrainedTokenizerFast:
    tokenizer: Any = read_pretrained(AutoTokenizer, model, where="llm.model", revision=revision)
    if not tokenizer.is_fast:
        raise PipelineError(
            f"{model} has no tokenizer.json", where="llm.model", remedy="choose a model with a fast tokenizer", code=ARTEFACT
        )
    if not tokenizer.chat_template:
        raise PipelineError(
            f"{model} has no chat template", where="llm.model", remedy="choose an instruct or chat model", code=ARTEFACT
        )
    return tokenizer


def _make_scaffold(tokenizer: PreTrainedTokenizerFast, model: str, date: str) -> Scaffold:
    try:
        source = str(tokenizer.get_chat_template())
    except ValueError as error:  # several of them, none of which is the default
        raise PipelineError(f"its chat template: {brief(error)}", where=model, code=ARTEFACT) from None
    variables = {name: _spelling(token) for name, token in tokenizer.special_tokens_map.items()}
    return Scaffold(Template(source, variables, date=date, where=model), model)


def _spelling(token: Any) -> Any:
    return [str(one) for one in token] if isinstance(token, list | tuple) else str(token)


def _control_tokens(tokenizer: PreTrainedTokenizerFast, image_token: str, written: str) -> dict[str, int]:
    """Added tokens that steer the model: the special ones, those the template writes around texts, and the image token.

    A thought's tags are words of the language where the tokenizer does not call them special: answers may have them.
    """
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special
        or token.content == image_token
        or (token.content.strip() and token.content in written and token.content not in THOUGHTS)
    }


def _content_tokenizer(tokenizer: PreTrainedTokenizerFast, control: set[str]) -> Tokenizer:
    """The same tokenizer blind to control tokens, so that a text which spells one is encoded letter by letter."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:  # left in place: taking one out would shift the ids of those behind it
        token["special"] = token["content"] in control
    state["post_processor"] = state["truncation"] = state["padding"] = None
    content = Tokenizer.from_str(json.dumps(state))
    content.encode_special_tokens = True
    return content


def _reserved(tokenizer: PreTrainedTokenizerFast) -> str:
    names = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return f"choose one of: {' '.join(names[:12])}" if names else "choose an existing token"
