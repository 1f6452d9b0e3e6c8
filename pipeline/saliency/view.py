"""An answered talk in, for each word of the answer a heat map over each picture out.

The answer stands there, so one forward pass over the whole row serves all its words: what decides a token is read off at the one
before it. Everything is computed in float32. Shapes: S pictures, T tokens, A of them the answer, W words, P image tokens.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.core import PipelineError
from pipeline.features import Encoder
from pipeline.records import Turn
from pipeline.saliency.gradient import gradient_maps, log_odds
from pipeline.saliency.rollout import require_attention_alone, require_room, seen_attention, trace_back, weights_of
from pipeline.saliency.words import split_words
from pipeline.text import PromptBuilder
from pipeline.vlm.model import VisionLanguageModel, decoder_layers

ROLLOUT, GRADIENT, TOKENS = "rollout", "gradient", "tokens"
METHODS = {
    ROLLOUT: "attention, traced back through language model and encoder",
    GRADIENT: "pixels that the word hangs on",
    TOKENS: "attention within the language model alone",
}


@dataclass(frozen=True, slots=True)
class Maps:
    """Of one method: `heat` float32 [W, S, grid, grid], which adds up to 1 over all pictures of a word, or is all 0."""

    method: str
    heat: np.ndarray


@dataclass(frozen=True, slots=True)
class Seen:
    """The words of an answer, and their maps by each method."""

    words: list[str]
    maps: list[Maps]


def look_back(
    model: VisionLanguageModel,
    encoder: Encoder,
    builder: PromptBuilder,
    turns: Sequence[Turn],
    pixels: torch.Tensor,
    methods: Sequence[str],
    *,
    tower: PreTrainedModel,
) -> Seen:
    """Where the words of the last turn, an assistant's, come from.

    Args:
        pixels: uint8 [S, 3, side, side] of the pictures that `turns` show, in order.
        tower: `encoder.exact_tower()`, since the one that encodes is rounded and closed to gradients.

    Raises `PipelineError` where there is no picture or no word, and for a language model or an encoder whose attention cannot be
    seen (see `rollout`).
    """
    prompt = builder.build(turns)
    first, end = (int(place) for place in np.asarray(prompt.spans).reshape(-1, 2)[-1])
    answer = np.asarray(prompt.ids[first:end])
    words = split_words(answer, builder.decode)
    if not len(pixels) or not words:
        raise PipelineError("no picture was shown" if words else "the answer has no words", remedy="ask about a picture")
    count = words[-1][1].stop  # what stands behind the last word, the end of the turn, decides nothing
    device = model.language_model.device
    row = _Row(
        model,
        encoder,
        ids=torch.as_tensor(np.asarray(prompt.ids[: first + count - 1]), dtype=torch.long, device=device)[None],
        answer=torch.as_tensor(answer[:count], dtype=torch.long, device=device),
        starts=torch.as_tensor(np.asarray(prompt.image_starts), dtype=torch.long, device=device),
        words=[tokens for _, tokens in words],
    )
    pixels = pixels.to(device)
    found = {}
    with torch.no_grad():
        if {ROLLOUT, TOKENS} & set(methods):
            found = row.by_attention(tower, pixels, wanted=methods)
        if GRADIENT in methods:
            found[GRADIENT] = row.by_gradient(tower, pixels)
    return Seen([word for word, _ in words], [Maps(method, _shares(found[method])) for method in methods])


def _shares(heat: torch.Tensor) -> np.ndarray:
    """[W, S, grid, grid] as shares of a word's whole."""
    whole = heat.sum(dim=(1, 2, 3), keepdim=True)
    return torch.where(whole > 0, heat / whole, 0.0).cpu().numpy()


@dataclass(frozen=True, slots=True)
class _Row:
    """ids [1, T] up to the last token that decides one of the answer [A]; where the pictures start [S]; tokens of each word."""

    model: VisionLanguageModel
    encoder: Encoder
    ids: torch.Tensor
    answer: torch.Tensor
    starts: torch.Tensor
    words: list[range]

    def by_attention(self, tower: PreTrainedModel, pixels: torch.Tensor, *, wanted: Sequence[str]) -> dict[str, torch.Tensor]:
        language_model, tokens = self.model.language_model, self.ids.shape[1]
        features, inside = self._encoded(tower, pixels, attention=ROLLOUT in wanted)
        layers = len(decoder_layers(language_model))
        require_room(language_model, layers, tokens)
        require_attention_alone(language_model)
        with seen_attention(language_model):
            output = self._run(features, output_attentions=True)
        weights = weights_of(language_model, getattr(output, "attentions", None), layers, tokens, causal=True)
        one_hot = F.one_hot(torch.arange(tokens - len(self.answer), tokens, device=self.ids.device), tokens).float()
        rows = trace_back(torch.stack([one_hot[word.start : word.stop].mean(0) for word in self.words]), weights)  # [W, T]
        places = self.starts[:, None] + torch.arange(self.encoder.tokens // self._merged**2, device=self.ids.device)
        patches = self._spread(rows[:, places])  # [W, S, grid, grid]
        found = {TOKENS: patches}
        if ROLLOUT in wanted:
            found[ROLLOUT] = torch.stack([self._through(patches[:, s], above) for s, above in enumerate(inside)], 1)
        return found

    def by_gradient(self, tower: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
        def odds(pixels: torch.Tensor) -> torch.Tensor:
            exact, _ = self.encoder.trace(tower, pixels, "float32")
            rounded = self.encoder.row_format.decode(self.encoder.row_format.encode(exact.detach())).to(exact)
            output = self._run(exact + (rounded - exact.detach()), **self._kept())  # the store's rounding, open to gradients
            return log_odds(output.logits[0, -len(self.answer) :], self.answer)

        return gradient_maps(odds, pixels, self.words, self._grid)

    @property
    def _grid(self) -> int:
        """Patches on a side of the encoder's square."""
        return isqrt(self.encoder.tokens) * self.encoder.pool

    @property
    def _merged(self) -> int:
        """Stored patches on a side of an image token."""
        merge: Any = getattr(self.model.projector, "merge", None)
        return 1 if merge is None else int(merge.factor)

    def _encoded(
        self, tower: PreTrainedModel, pixels: torch.Tensor, *, attention: bool
    ) -> tuple[torch.Tensor, list[list[torch.Tensor]]]:
        """Features [S, P, Dv] as the store has them, and each picture's weights [H, N, N] of each of the tower's layers."""
        inside: list[list[torch.Tensor]] = []
        if not attention:
            exact = self.encoder.trace(tower, pixels, "float32")[0]
        else:
            parts = []
            with seen_attention(tower):
                for picture in pixels.split(1):
                    part, output = self.encoder.trace(tower, picture, "float32", output_attentions=True)
                    attentions: Any = getattr(output, "attentions", None)
                    tokens = attentions[0].shape[-1] if attentions else 0
                    inside.append(weights_of(tower, attentions, tower.config.num_hidden_layers, tokens, causal=False))
                    parts.append(part)
            exact = torch.cat(parts)
        return self.encoder.row_format.decode(self.encoder.row_format.encode(exact)).to(exact), inside

    def _run(self, features: torch.Tensor, **options: Any) -> Any:
        row = torch.zeros_like(self.starts)
        embedded = self.model.embed(self.ids, features, row, self.starts)
        return self.model.language_model(inputs_embeds=embedded, use_cache=False, **options)

    def _kept(self) -> dict[str, int]:
        """Have logits of the answer alone made, where a family can leave out the others."""
        takes = inspect.signature(self.model.language_model.forward).parameters
        return {"logits_to_keep": len(self.answer)} if "logits_to_keep" in takes else {}

    def _spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens [W, S, P] -> the encoder's patches that they are made of, in equal shares [W, S, grid, grid]."""
        times = self._merged * self.encoder.pool
        square = tokens.unflatten(-1, (isqrt(tokens.shape[-1]),) * 2)
        return square.repeat_interleave(times, -1).repeat_interleave(times, -2) / times**2

    def _through(self, patches: torch.Tensor, layers: list[torch.Tensor]) -> torch.Tensor:
        """Weights [W, grid, grid] over what the encoder gives -> over what it is given. A CLS token and registers, which stand
        before the patches and say nothing of the picture, keep what falls to them."""
        flat = patches.flatten(1)
        before = layers[0].shape[-1] - flat.shape[1] if layers else 0
        return trace_back(F.pad(flat, (before, 0)), layers)[:, before:].view_as(patches)
