"""A trained model put to use: pictures in, answers out. Chat and the report use it; training has no part in it."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import TextIteratorStreamer

from pipeline.core import PipelineError, merged_tokens
from pipeline.core.devices import autocast, pick_device, pick_precision
from pipeline.features import Encoder
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
class Conversation:
    """Turns so far and the features [P, Dv] of every picture they show."""

    turns: list[Turn] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)


class Assistant:
    """A checkpoint folder, ready to answer.

    Raises `PipelineError` when the folder holds no model, or its encoder is not the one it was trained with.
    """

    def __init__(self, folder: str | Path, *, device: str = "auto") -> None:
        manifest = checkpoint.read_manifest(folder)
        self.device = pick_device(device)
        self.precision = pick_precision("auto", self.device)
        vision = manifest.vision
        self.encoder = Encoder(
            vision["model"],
            revision=vision["revision"],
            layer=vision["layer"],
            precision="auto" if vision["spec"]["precision"] == "float16" else vision["spec"]["precision"],
            storage=vision["spec"].get("storage", "float16"),
            pool=int(vision["spec"].get("pool", 1)),
            device=self.device,
            batch=1,
        )
        found, trained = self.encoder.spec(), vision["spec"]
        if differ := [key for key in trained if key != "precision" and found.get(key) != trained[key]]:
            raise PipelineError(
                f"{vision['model']} has changed since training ({differ[0]})", where=str(folder), remedy="dvc repro"
            )
        self.model = checkpoint.load(folder)[0].eval().to(self.device)
        llm = str(folder) if manifest.own_llm else manifest.llm["model"]
        revision = "" if manifest.own_llm else manifest.llm["revision"]
        image_token = manifest.llm["image_token"]
        tokens = merged_tokens(self.encoder.tokens, manifest.merging[1])
        date = manifest.llm.get("date", DATE)
        self.builder = PromptBuilder(llm, revision=revision, image_token=image_token, tokens=tokens, date=date)
        self.context = getattr(self.model.language_model.config, "max_position_embeddings", None)

    def look(self, path: str | Path) -> torch.Tensor:
        """Patch features float16 [P, Dv] of a picture file."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise ImageError(error.strerror or "unreadable", where=str(path), remedy="give the path of a picture") from None
        return self.encoder.encode_files([data], [str(path)])[0]

    def ask(self, talk: Conversation, text: str, picture: torch.Tensor | None = None) -> None:
        """Add a user's turn; the picture stands before the text. `<image>` typed by a person stays text."""
        parts: list[str | ImageSlot] = []
        if picture is not None:
            parts.append(ImageSlot(len(talk.features)))
            talk.features.append(picture)
            text = f"\n{text}"
        talk.turns.append(Turn("user", (*parts, text)))

    def answer(self, talk: Conversation, sampling: Sampling) -> Iterator[str]:
        """The answer to the last turn, piece by piece as it is generated; it then joins the conversation."""
        prompt = self.builder.build_question(talk.turns)
        if self.context and len(prompt.ids) + sampling.max_new_tokens > self.context:
            raise PipelineError(
                f"{len(prompt.ids)} tokens so far and up to {sampling.max_new_tokens} to come, the model holds {self.context}",
                remedy="/reset, or fewer --max-tokens",
            )
        streamer = TextIteratorStreamer(self.builder.tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        failure: list[BaseException] = []
        thread = threading.Thread(target=self._generate, args=(prompt, talk.features, sampling, streamer, failure), daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            yield piece
        thread.join()
        if failure:
            raise failure[0]
        talk.turns.append(Turn("assistant", ("".join(pieces).strip() or " ",)))

    def _generate(
        self,
        prompt: Prompt,
        features: list[torch.Tensor],
        sampling: Sampling,
        streamer: TextIteratorStreamer,
        failure: list[BaseException],
    ) -> None:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        nothing = torch.empty(0, self.encoder.tokens, self.encoder.width, dtype=torch.float16)
        shown = torch.stack(features) if features else nothing
        try:
            torch.manual_seed(sampling.seed)
            with autocast(self.precision, self.device):
                generate(
                    self.model,
                    self.builder,
                    [prompt.ids],
                    [prompt.image_starts],
                    shown,
                    max_new_tokens=sampling.max_new_tokens,
                    device=self.device,
                    streamer=streamer,
                    **(drawn if sampling.temperature > 0 else GREEDY),
                )
        except BaseException as error:
            failure.append(error)
        finally:
            streamer.end()
