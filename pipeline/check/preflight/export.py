"""Whether what will be trained can leave as a Transformers folder: a note, since training does without."""

from collections.abc import Iterator
from typing import Any

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project
from pipeline.core import PipelineError
from pipeline.params import Projector
from pipeline.vlm.model import BIASLESS, out_of_place, require_idefics3, require_place

LEAVES = ("clip", "siglip")
TRAINS = "it trains and chats all the same; `python -m pipeline.export` will refuse it"


def check_export(project: Project) -> Iterator[Finding]:
    """Projector, hidden state and language model against what LLaVA and Idefics3 have a place for."""
    params, encoders = project.params, project.encoders
    tower = encoders[0].tower_config
    if len(encoders) > 1:
        yield Finding(f"no export: no stock class joins {len(encoders)} encoders", "vision.model", TRAINS, note=True)
    elif tower is not None:
        family = tower.model_type.removesuffix("_vision_model")
        if family not in LEAVES:
            yield Finding(f"no export: LLaVA takes no {family} encoder", "vision.model", TRAINS, note=True)
        elif encoders[0].named.pool > 1:
            yield Finding("no export: no class has a place for pooled features", "vision.pool", TRAINS, note=True)
        try:
            _require_class(params.projector, encoders[0].named.layer, tower)
        except PipelineError as error:
            yield Finding(f"no export: {error.what}", error.where, error.remedy, note=True)
    if project.model is not None and (problem := out_of_place(project.model)):
        yield Finding(f"no export: {problem}", "llm.model", TRAINS, note=True)


def _require_class(projector: Projector, layer: int, tower: Any) -> None:
    """Raises `PipelineError` where neither LLaVA nor Idefics3 has a place for this projector behind this tower."""
    kind, merging = projector.kind, (projector.merge if projector.factor > 1 else "none", projector.factor)
    if merging[0] != "none" or kind == BIASLESS:
        require_idefics3(kind, merging, family=tower.model_type, layer=layer, grid=tower.image_size // tower.patch_size)
    else:
        has_cls = tower.model_type.removesuffix("_vision_model") == "clip"
        require_place(kind, family=tower.model_type, has_cls=has_cls, layer=layer, layers=tower.num_hidden_layers)
