"""What the checks look at: a project's params and the parts they name, each read once, None where it cannot be."""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from pipeline.check.costs import encoder_shape
from pipeline.core import PipelineError, brief, merged_tokens
from pipeline.core.loading import read_pretrained
from pipeline.features import TOWERS, Preprocessor
from pipeline.params import Member, Params, read_yaml
from pipeline.text import PromptBuilder


class Project:
    """A params.yaml and the folder it stands in, which is the current one.

    A property that gives a part or a `PipelineError` is read by the check that reports it; all others ask for the part and
    go without where it is none.
    """

    def __init__(self, params: Params) -> None:
        self.params = params

    @cached_property
    def made(self) -> set[Path]:
        """What the stages of dvc.yaml files here and below data make, and what .dvc files stand for."""
        found: set[Path] = set()
        for file in (Path("dvc.yaml"), *sorted(Path("data").glob("dvc.yaml"))):
            try:
                stages = read_yaml(file).get("stages", {})
            except PipelineError:
                continue
            for stage in stages.values():
                for out in stage.get("outs", []) if isinstance(stage, dict) else []:
                    folder = file.parent / str(stage.get("wdir", "."))
                    found.add(Path(_plain(folder / str(next(iter(out)) if isinstance(out, dict) else out))))
        return found

    def is_made_later(self, model: str) -> bool:
        """Whether a folder that is not there is one that a stage makes, or `dvc pull` brings."""
        path = Path(_plain(Path(model)))
        return not path.exists() and (
            any(path == out or out in path.parents for out in self.made) or Path(f"{model}.dvc").is_file()
        )

    @cached_property
    def language_config(self) -> Any:
        """The language model's configuration, or the error that says why there is none."""
        llm = self.params.llm
        return _configuration(llm.model, llm.revision, "llm.model")

    @cached_property
    def encoders(self) -> list["EncoderParts"]:
        """Each encoder that params name."""
        return [EncoderParts(member) for member in self.params.vision.members]

    @property
    def patches(self) -> int:
        """Placeholders an image; 1 where the encoder does not say."""
        try:
            return merged_tokens(encoder_shape(self.params).tokens, self.params.projector.factor)
        except PipelineError:
            return 1

    @cached_property
    def skeleton(self) -> Any:
        """The language model without weights, or the error; None where its configuration is no causal model's."""
        config = self.language_config
        if isinstance(config, PipelineError) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return None
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        except Exception as error:  # each family has its own ways to refuse a configuration
            return PipelineError(
                f"Transformers cannot build this {config.model_type}: {brief(error)}", where="llm.model", remedy="mend config.json"
            )

    @property
    def model(self) -> Any | None:
        """The skeleton, None where there is none."""
        return None if isinstance(self.skeleton, PipelineError) else self.skeleton

    @cached_property
    def builder(self) -> PromptBuilder | PipelineError:
        llm = self.params.llm
        try:
            return PromptBuilder(llm.model, revision=llm.revision, image_token=llm.image_token, tokens=self.patches, date=llm.date)
        except PipelineError as error:
            return error

    def trainings(self) -> Iterator[tuple[str, Any, Any]]:
        """Name, section and data set of each training stage."""
        yield "pretrain", self.params.pretrain, self.params.data.pretrain
        yield "sft", self.params.sft, self.params.data.sft


class EncoderParts:
    """What can be read of one encoder without its weights."""

    def __init__(self, named: Member) -> None:
        self.named = named

    @cached_property
    def config(self) -> Any:
        """The encoder's configuration, or the error."""
        return _configuration(self.named.model, self.named.revision, "vision.model")

    @cached_property
    def tower_config(self) -> Any | None:
        """Of the vision tower; None for a model that has none that is known here."""
        if isinstance(self.config, PipelineError) or self.config.model_type not in TOWERS:
            return None
        return getattr(self.config, "vision_config", self.config)

    @cached_property
    def preprocessor(self) -> Preprocessor | PipelineError:
        try:
            return Preprocessor(self.named.model, self.named.revision)
        except PipelineError as error:
            return error


def _plain(path: Path) -> str:
    """A path without `.` and `..`, which need not exist."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _configuration(model: str, revision: str, where: str) -> Any:
    try:
        return read_pretrained(AutoConfig, model, where=where, revision=revision)
    except PipelineError as error:
        return error
