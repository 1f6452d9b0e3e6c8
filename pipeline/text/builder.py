"""A conversation's turns -> token ids, supervised spans and image positions, for one tokenizer and its chat template.

The chat template is taken apart once per order of roles: it is rendered with marks in place of the contents, so that
template and content are encoded apart. A content can then never yield a control token, and what is supervised (the
assistant's words and its end-of-turn token) and where images stand is known by construction, never searched for.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.core import ARTEFACT, BAD_ROWS, PipelineError, brief
from pipeline.core.loading import read_pretrained
from pipeline.records import Turn
from pipeline.text.prompts import ID, Encoded, Layout, Pattern, Prompt, Prompts, flatten, lay_out

TEXT_VERSION = 1  # part of every token table's spec: raise it when pipeline/text gives other ids


# answers are short, so a think block stays empty; some templates (MiniMind2) then write one in the prompt alone
THINKING: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {})


class PromptBuilder:
    """Builds prompts for one tokenizer and P placeholder tokens an image.

    Args:
        model, revision: a Transformers folder or hub id whose tokenizer has a chat template.
        image_token: an existing token of its vocabulary that stands in for image features.
        tokens: placeholders an image (P).

    Raises `PipelineError` when the template is missing or cannot be taken apart, or the image token is not one token.
    """

    def __init__(self, model: str, *, revision: str = "", image_token: str, tokens: int) -> None:
        self.tokenizer = _load_tokenizer(model, revision)
        self.model, self.tokens = model, tokens
        vocabulary = self.tokenizer.get_vocab()
        if image_token not in vocabulary:
            raise PipelineError(
                f"{image_token!r} is not a token of {model}", where="llm.image_token", remedy=_reserved(self.tokenizer)
            )
        self.image_token, self.image_id = image_token, vocabulary[image_token]
        self.control = _control_tokens(self.tokenizer, image_token)
        self._is_control = np.zeros(max(vocabulary.values()) + 1, bool)
        self._is_control[list(self.control.values())] = True
        self._content = _content_tokenizer(self.tokenizer, set(self.control))
        self._image = self._bytes((self.image_id,) * tokens)
        self._pattern = lru_cache(maxsize=4096)(self._make_pattern)
        self.options = next((options for options in THINKING if self._generates_as_trained(options)), THINKING[0])
        closing = self._pieces(("user", "assistant"), generate=False)[-1]
        self.end_id = closing[self._end_of_turn(closing) - 1]
        self._check()

    def _pieces(self, roles: tuple[str, ...], generate: bool) -> list[list[int]]:
        """Template ids before, between and after the contents of turns with these roles: len(roles) + 1 pieces."""
        marks = [f"[slot{i:05d}]" for i in range(len(roles))]
        text = self._render([{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)], generate)
        pieces = []
        for mark in marks:
            before, found, text = text.partition(mark)
            if not found:
                raise PipelineError(
                    f"its chat template drops or reorders turns ({', '.join(roles)})", where=self.model, code=ARTEFACT
                )
            pieces.append(before)
        return [self.tokenizer.encode(piece, add_special_tokens=False) for piece in [*pieces, text]]

    def _make_pattern(self, roles: tuple[str, ...], *, trim: bool, generate: bool) -> Pattern:
        first, *others = self._pieces(roles, generate)
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

    def _generates_as_trained(self, options: dict[str, Any]) -> bool:
        """Whether the template's generation prompt is what stands before an answer in training."""
        self.options = options
        asked = [{"role": "user", "content": "What is this?"}]
        prompt = self._render(asked, generate=True)
        return self._render([*asked, {"role": "assistant", "content": "A cat."}], generate=False).startswith(f"{prompt}A cat.")

    def _render(self, messages: list[dict[str, str]], generate: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(  # type: ignore[return-value]
                messages, tokenize=False, add_generation_prompt=generate, **self.options
            )
        except Exception as error:  # a template is a program of the model's: whatever it raises refuses these turns
            roles = ", ".join(message["role"] for message in messages)
            raise PipelineError(
                f"its chat template refuses turns {roles}: {brief(error)}", where=self.model, code=BAD_ROWS
            ) from None

    def _check(self) -> None:
        """The assembled ids must be the template's own, and training must see the prefix that generation will."""
        talk = [("user", "What is this?"), ("assistant", "It is a cat."), ("user", "Which colour?"), ("assistant", "Black.")]
        turns = [Turn(role, (text,)) for role, text in talk]
        whole = self._render([{"role": role, "content": text} for role, text in talk], generate=False)
        expected = self.tokenizer.encode(whole, add_special_tokens=False)
        built = self.build(turns, trim=False).ids.tolist()
        if built != expected:
            at = next((i for i, (a, b) in enumerate(zip(built, expected, strict=False)) if a != b), min(len(built), len(expected)))
            raise PipelineError(
                f"its chat template cannot be taken apart: ids differ at {at}",
                where=self.model,
                remedy="choose another llm.model",
                code=ARTEFACT,
            )
        prompt, trained = self.build_question(turns[:3]), self.build(turns)
        if prompt.ids.tolist() != trained.ids[: trained.spans[-1][0]].tolist():
            raise PipelineError("its generation prompt differs from what training would show", where=self.model, code=ARTEFACT)

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
        return self._build(lay_out(conversations, lambda roles: self._pattern(roles, trim=trim, generate=False), self._image))

    def build(self, turns: Sequence[Turn], *, trim: bool = True) -> Prompt:
        """One prompt, as `build_batch` makes it."""
        return self.build_batch([turns], trim=trim)[0]

    def build_question(self, turns: Sequence[Turn]) -> Prompt:
        """A prompt that ends where the assistant's answer begins; nothing in it is supervised."""
        return self._build(lay_out([turns], lambda roles: self._pattern(roles, trim=False, generate=True), self._image))[0]

    def _build(self, layout: Layout) -> Prompts:
        """Template ids and the contents' ids joined; spans and image starts follow from the lengths of what stands before them."""
        return layout.join(self.encode(layout.texts))

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

    def spec(self) -> dict[str, object]:
        """Everything that decides the ids; kept in every token table and checkpoint."""
        backend = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        template = hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()
        return {"text": TEXT_VERSION, "tokenizer": backend, "template": template, "image_id": self.image_id, "tokens": self.tokens}


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


def _control_tokens(tokenizer: PreTrainedTokenizerFast, image_token: str) -> dict[str, int]:
    """Added tokens that steer the model: the special ones, those the template writes, and the image token."""
    template = str(tokenizer.chat_template)
    return {
        token.content: number
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in (image_token, *_tokens_in(template, tokenizer))
    }


def _tokens_in(template: str, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip() and token.content in template
    ]


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
