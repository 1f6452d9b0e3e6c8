"""What is exported: a checkpoint folder put together with its encoder, in float32 on the CPU."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.chat.assistant import Assistant
from pipeline.core import ARTEFACT, PipelineError
from pipeline.core.devices import DTYPES
from pipeline.features import Encoder
from pipeline.text import PromptBuilder
from pipeline.vlm.model import Manifest, VisionLanguageModel, checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """A model to export.

    Attributes:
        manifest: what the checkpoint says of itself.
        assistant: the model as `pipeline.chat` runs it, in float32 so that it can be compared with an export.
    """

    folder: Path
    manifest: Manifest
    assistant: Assistant

    @classmethod
    def open(cls, folder: str | Path, *, dtype: str = "float32") -> "Source":
        """A checkpoint with its weights rounded to `dtype`, so that an export in it is exact.

        Raises `PipelineError` when the folder holds no model, or its encoder is not the one it was trained with.
        """
        manifest = checkpoint.read_manifest(folder)
        if len(manifest.encoders) > 1:
            problem = f"no stock class joins {len(manifest.encoders)} encoders"
            raise PipelineError(problem, where="vision.model", remedy="train with one encoder; what can leave: docs/export.md")
        assistant = Assistant(folder, device="cpu")
        source = cls(Path(folder), manifest, assistant)
        assistant.precision = source.encoder.precision = "float32"
        for module in (source.model, source.encoder.tower):
            _round(module, DTYPES[dtype])
        return source

    @property
    def model(self) -> VisionLanguageModel:
        return self.assistant.model

    @property
    def language_model(self) -> PreTrainedModel:
        return self.assistant.model.language_model

    @property
    def encoder(self) -> Encoder:
        return self.assistant.encoder.members[0]

    @property
    def builder(self) -> PromptBuilder:
        return self.assistant.builder

    @property
    def kind(self) -> str:
        """The projector's kind (see `pipeline.vlm.model.projector`)."""
        return str(self.manifest.projector["kind"])

    def check_vision(self, target: str) -> None:
        """Raises `PipelineError` where `target`, made for CLIP and SigLIP, has no place for this encoder or for merged patches."""
        self.check_rows(target)
        merge, factor = self.manifest.merging
        if merge != "none":
            raise PipelineError(
                f"{target} has no place for a projector that merges patches ({merge}, {factor} × {factor})",
                where="projector.merge",
                remedy="train with projector.merge: none, projector.factor: 1",
            )

    def check_rows(self, target: str) -> None:
        """Raises `PipelineError` where no class of Transformers gives the patch features that were trained on."""
        family = self.manifest.vision["spec"]["config"].get("family")
        if family:
            remedy = "train with a CLIP or SigLIP encoder"
            raise PipelineError(f"{target} takes no {family} encoder", where="vision.model", remedy=remedy)
        if pool := self.manifest.vision["spec"].get("pool"):
            raise PipelineError(f"{target} has no place for features pooled {pool} × {pool}", remedy="train with vision.pool: 1")

    @property
    def depth(self) -> int:
        """How many of the encoder's layers features have passed; the tower may or may not hold those behind them."""
        layer = int(self.manifest.vision["layer"])
        layers = int(self.manifest.vision["spec"]["config"]["num_hidden_layers"])
        return layer if layer >= 0 else layers + 1 + layer

    @property
    def has_cls(self) -> bool:
        """Whether the encoder puts a CLS token before its patches, as CLIP does and SigLIP does not."""
        return hasattr(self.encoder.tower.embeddings, "class_embedding")

    @property
    def select_strategy(self) -> str:
        """LLaVA's words for "without the CLS token" and "all tokens"."""
        return "default" if self.has_cls else "full"


def _round(module: nn.Module, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(parameter.to(dtype))
            if not torch.isfinite(parameter).all():
                raise PipelineError(f"{name} is not finite in {dtype}", remedy="--dtype float32", code=ARTEFACT)
