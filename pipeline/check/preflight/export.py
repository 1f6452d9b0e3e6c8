"""Whether what will be trained can leave as a Transformers LLaVA folder: a note, since training does without."""

from collections.abc import Iterator

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project
from pipeline.core import PipelineError
from pipeline.vlm.model import out_of_place, require_place

LEAVES = ("clip", "siglip")
TRAINS = "it trains and chats all the same; `python -m pipeline.export` will refuse it"


def check_export(project: Project) -> Iterator[Finding]:
    """Projector, hidden state and language model against what LLaVA has a place for."""
    params, tower = project.params, project.tower_config
    if tower is not None:
        family = tower.model_type.removesuffix("_vision_model")
        has_cls = family == "clip"
        if family not in LEAVES:
            yield Finding(f"no export: LLaVA takes no {family} encoder", "vision.model", TRAINS, note=True)
        elif params.vision.pool > 1 or params.projector.merge != "none":
            yield Finding("no export: LLaVA has no place for merged patches", "vision.pool, projector.merge", TRAINS, note=True)
        try:
            require_place(
                params.projector.kind,
                family=tower.model_type,
                has_cls=has_cls,
                layer=params.vision.layer,
                layers=tower.num_hidden_layers,
            )
        except PipelineError as error:
            yield Finding(f"no export: {error.what}", error.where, error.remedy, note=True)
    if project.model is not None and (problem := out_of_place(project.model)):
        yield Finding(f"no export: {problem}", "llm.model", TRAINS, note=True)
