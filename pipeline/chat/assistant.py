"""A trained model put to use: pictures in, answers out. Chat and the report use it; training has no part in it."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from pipeline.chat.packed import Packed, pack, using
from pipeline.chat.paths import OTHER, read_picture
from pipeline.core import RESOURCE, PipelineError, merged_tokens, named_by
from pipeline.core.devices import autocast, pick_device, pick_precision
from pipeline.features import RESAMPLING, Encoder, join_encoders, warn_of_resampling
from pipeline.records import ImageError, ImageSlot, Turn
from pipeline.text import DATE, Prompt, PromptBuilder
from pipeline.vlm.model import GREEDY, checkpoint, generate


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn: temperature 0 is greedy."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(slots=True)
class Pace:
    """How fast an answer came: tokens, and seconds from the question to the first and to the last of them."""

    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    def line(self) -> str:
        """For a person: the rate is that of the tokens behind the first, which waits for the prompt."""
        rate = f"{(self.tokens - 1) / (self.last - self.first):,.0f} tokens/s, " if self.last > self.first else ""
        return f"{self.tokens} tokens, {rate}the first after {self.first:.2f} s"


@dataclass(slots=True)
class Conversation:
    """Turns so far and the features [P, Dv] of every picture they show."""

    turns: list[Turn] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)


def user_turn(text: str, slots: Iterable[int]) -> Turn:
    """What a person asks: pictures by their numbers in the conversation, a line each, before the words."""
    parts = [part for slot in slots for part in (ImageSlot(slot), "\n")]
    return Turn("user", (*parts[:-1], f"\n{text}" if parts else text))


class Assistant:
    """A checkpoint folder, ready to answer.

    One answer is made at a time; others wait, so that several people may share it.

    Args:
        batch: pictures per call of the encoder (see `look_at`).

    Raises `PipelineError` when the folder holds no model, or its encoder is not the one it was trained with.
    """

    def __init__(self, folder: str | Path, *, device: str = "auto", batch: int = 1) -> None:
        manifest = checkpoint.read_manifest(folder)
        self.device = pick_device(device)
        self.precision = pick_precision("auto", self.device)
        self.encoder = join_encoders([_encoder(folder, vision, self.device, batch) for vision in manifest.encoders])
        self.model = checkpoint.load(folder)[0].eval().to(self.device)
        llm = str(folder) if manifest.own_llm else named_by(folder, manifest.llm["model"])
        revision = "" if manifest.own_llm else manifest.llm["revision"]
        image_token = manifest.llm["image_token"]
        self.factor = manifest.merging[1]
        tokens = merged_tokens(self.encoder.tokens, self.factor)
        date = manifest.llm.get("date", DATE)
        self.builder = PromptBuilder(llm, revision=revision, image_token=image_token, tokens=tokens, date=date)
        self.context = getattr(self.model.language_model.config, "max_position_embeddings", None)
        self.one_at_a_time = threading.Lock()

    @cached_property
    def exact_tower(self) -> PreTrainedModel:
        """The encoder's tower as it is in its files, for what looks back at an answer; read when first asked for."""
        return self.encoder.members[0].exact_tower()

    @cached_property
    def packed(self) -> Packed:
        """The language model's large matrices as one answer on a CPU reads them; made when first asked for."""
        return pack(self.model.language_model)

    def look(self, path: str | Path, *, name: str = "") -> torch.Tensor:
        """Patch features float16 [P, Dv] of a picture file; messages call it `name`, or its path."""
        return self.look_at(read_picture(Path(path), name=name), name or str(path))

    def look_at(self, data: bytes, name: str) -> torch.Tensor:
        """Patch features float16 [P, Dv] of a picture file's bytes."""
        try:
            return self.encoder.encode_files([data], [name])[0].cpu()  # kept for the whole talk
        except ImageError as error:
            raise ImageError(error.what, where=error.where, remedy=OTHER) from None

    def ask(self, talk: Conversation, text: str, pictures: torch.Tensor | Sequence[torch.Tensor] | None = None) -> None:
        """Add a user's turn; its pictures stand before the text. `<image>` typed by a person stays text."""
        shown = [] if pictures is None else [pictures] if isinstance(pictures, torch.Tensor) else list(pictures)
        first = len(talk.features)
        talk.features += shown
        talk.turns.append(user_turn(text, range(first, len(talk.features))))

    def answer(
        self, talk: Conversation, sampling: Sampling, *, stop: threading.Event | None = None, pace: Pace | None = None
    ) -> Iterator[str]:
        """The answer to the last turn, piece by piece as it is generated; it then joins the conversation.

        `stop`, once set, ends it after the token in the making, and what was said so far joins. An iterator that is closed
        early stops likewise and leaves no thread at work.
        """
        prompt = self._prompt(talk, sampling)
        stop, pace = stop or threading.Event(), pace or Pace()
        streamer = _Streamer(self.builder.tokenizer, pace)
        failure: list[BaseException] = []
        thread = threading.Thread(target=self._generate, args=(prompt, talk.features, sampling, streamer, stop, failure))
        thread.start()
        pieces = []
        try:
            for piece in streamer:
                pieces.append(piece)
                yield piece
        except BaseException:
            stop.set()
            raise
        finally:
            thread.join()
        if failure:
            raise failure[0]
        talk.turns.append(Turn("assistant", ("".join(pieces).strip() or " ",)))

    def answer_all(self, questions: Sequence[tuple[str, Sequence[torch.Tensor]]], sampling: Sampling) -> list[str | PipelineError]:
        """Answers to questions that have nothing to do with each other, made together: words and the pictures [P, Dv] of each.

        A question that the model has no room for is answered by the error.
        """
        found: list[str | PipelineError] = []
        talks: list[tuple[Prompt, list[torch.Tensor]]] = []
        for text, pictures in questions:
            talk = Conversation()
            self.ask(talk, text, pictures)
            try:
                talks.append((self._prompt(talk, sampling), talk.features))
                found.append("")
            except PipelineError as error:
                found.append(error)
        if talks:
            features = [picture for _, pictures in talks for picture in pictures]
            produced = iter(self._produce([prompt for prompt, _ in talks], features, sampling))
            found = [one if isinstance(one, PipelineError) else self.builder.decode(next(produced)).strip() for one in found]
        return found

    def _prompt(self, talk: Conversation, sampling: Sampling) -> Prompt:
        prompt = self.builder.build_question(talk.turns)
        if self.context and len(prompt.ids) + sampling.max_new_tokens > self.context:
            raise PipelineError(
                f"{len(prompt.ids)} tokens so far and up to {sampling.max_new_tokens} to come, the model holds {self.context}",
                remedy="begin a new topic, or ask in fewer words",
            )
        return prompt

    def _produce(
        self, prompts: Sequence[Prompt], features: Sequence[torch.Tensor], sampling: Sampling, **options: Any
    ) -> np.ndarray:
        """Ids of an answer to each prompt; `features` are all their pictures', in order."""
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        nothing = torch.empty(0, self.encoder.tokens, self.encoder.width, dtype=torch.float16)
        shown = torch.stack(list(features)) if features else nothing
        # one answer on a CPU multiplies by a vector, which bfloat16 makes no faster; casting weights and states costs a third
        alone = len(prompts) == 1 and self.device.type == "cpu"
        precision = "float32" if alone else self.precision
        with self.one_at_a_time, autocast(precision, self.device), using(self.packed if alone else {}):
            torch.manual_seed(sampling.seed)
            return generate(
                self.model,
                self.builder,
                [prompt.ids for prompt in prompts],
                [prompt.image_starts for prompt in prompts],
                shown,
                max_new_tokens=sampling.max_new_tokens,
                device=self.device,
                **options,
                **(drawn if sampling.temperature > 0 else GREEDY),
            )

    def _generate(
        self,
        prompt: Prompt,
        features: list[torch.Tensor],
        sampling: Sampling,
        streamer: "_Streamer",
        stop: threading.Event,
        failure: list[BaseException],
    ) -> None:
        try:
            self._produce([prompt], features, sampling, streamer=streamer, stopping_criteria=StoppingCriteriaList([_Stop(stop)]))
        except (torch.OutOfMemoryError, MemoryError):
            failure.append(PipelineError("no memory left for this answer", remedy="begin a new topic", code=RESOURCE))
        except BaseException as error:
            failure.append(error)
        finally:
            streamer.end()


def _encoder(folder: str | Path, vision: dict[str, Any], device: torch.device, batch: int) -> Encoder:
    """An encoder that a checkpoint names; raises `PipelineError` where it is not as it was in training."""
    trained = vision["spec"]
    encoder = Encoder(
        named_by(folder, vision["model"]),
        revision=vision["revision"],
        layer=vision["layer"],
        precision="auto" if trained["precision"] == "float16" else trained["precision"],
        storage=trained.get("storage", "float16"),
        pool=int(trained.get("pool", 1)),
        device=device,
        batch=batch,
    )
    found = encoder.spec()
    warn_of_resampling(trained, str(folder), "train it again")
    if differ := [key for key in trained if key not in ("precision", RESAMPLING) and found.get(key) != trained[key]]:
        raise PipelineError(f"{vision['model']} has changed since training ({differ[0]})", where=str(folder), remedy="dvc repro")
    return encoder


class _Streamer(TextIteratorStreamer):
    """Hands text over as it is made, and notes when."""

    def __init__(self, tokenizer: Any, pace: Pace) -> None:
        super().__init__(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._pace, self._began = pace, time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if value.numel():  # the prompt comes first, as no tokens: it was embeddings
            self._pace.tokens += value.numel()
            self._pace.last = time.perf_counter() - self._began
            self._pace.first = self._pace.first or self._pace.last
        super().put(value)


class _Stop(StoppingCriteria):
    """Ends generation once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: Any, *_: Any, **__: Any) -> Any:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)
