"""A checkpoint of this project, or a plain Transformers folder -> a `.pth` in MiniMind's or MiniMind-V's layout."""

from pathlib import Path

from transformers import PreTrainedConfig

from pipeline.core import ARTEFACT, PipelineError
from pipeline.core.devices import DTYPES
from pipeline.minimind.configuration import layout_of, settings
from pipeline.minimind.convert import Tensors, from_transformers
from pipeline.minimind.importing import refuse_existing
from pipeline.minimind.layout import EMBEDDING, HEAD, Layout, check
from pipeline.minimind.projector import READERS, to_minimind
from pipeline.minimind.pth import check_finite, write_pth
from pipeline.vlm.model import checkpoint, load_language_model


def export_folder(source: Path, path: Path, *, dtype: str) -> list[str]:
    """Write a checkpoint, or a plain Transformers folder, as MiniMind weights; returns the lines that say what was written.

    Raises `PipelineError` for a model that MiniMind's layouts do not have, for values that `dtype` cannot hold, and when
    `path` is there already.
    """
    where = str(source)
    refuse_existing(path)
    if path.is_dir():
        raise PipelineError("is a folder", where=str(path), remedy="give the name of a .pth file")
    if not source.is_dir():
        raise PipelineError("no such folder", where=where, remedy="give a trained model, such as models/sft")
    projector: Tensors = {}
    kind = ""
    if (source / checkpoint.MANIFEST).is_file():
        loaded, manifest = checkpoint.load(source)
        if len(manifest.encoders) > 1:
            problem = f"MiniMind-V has one encoder, this model joins {len(manifest.encoders)}"
            raise PipelineError(problem, where=where, remedy="train with one: vision.model")
        model, kind = loaded.language_model, manifest.projector["kind"]
        projector = to_minimind(loaded.projector, kind)
    elif (source / "config.json").is_file():
        model = load_language_model(where)
    else:
        raise PipelineError(
            f"holds neither {checkpoint.MANIFEST} nor config.json", where=where, remedy="give a trained model", code=ARTEFACT
        )
    layout = layout_of(model.config, where=where)
    tensors = from_transformers(dict(model.state_dict()), layout, where=where)
    check({name: tuple(tensor.shape) for name, tensor in tensors.items()}, layout, where=where)
    cast = {name: tensor.detach().to(DTYPES[dtype]) for name, tensor in (tensors | projector).items()}
    if layout.tied:
        cast[HEAD] = cast[EMBEDDING]
    for name, tensor in cast.items():
        check_finite(name, tensor, where=where, remedy="--dtype float32" if dtype == "float16" else "")
    write_pth(path, cast)
    return _report_export(path, layout, model.config, cast, kind, dtype)


def _report_export(path: Path, layout: Layout, config: PreTrainedConfig, written: Tensors, kind: str, dtype: str) -> list[str]:
    theirs, ours = settings(config, layout)
    size = sum(tensor.numel() for name, tensor in written.items() if name != HEAD or not layout.tied)
    arguments = ", ".join(f"{key}={value!r}" for key, value in theirs.items())
    options = "".join(f" {key} {value}" for key, value in ours.items())
    lines = [
        f"{path}: MiniMind's layout of {layout.year}, {len(written)} tensors, {size:,} parameters, {dtype}",
        f"in MiniMind: MiniMindConfig({arguments}), and this model's tokenizer",
        f"back again: python -m pipeline.minimind import {path} OUT{options} --tokenizer FOLDER",
    ]
    if kind and (kind, layout.year) in READERS:
        lines.insert(1, f"projector: {kind}, as in MiniMind-V {READERS[kind, layout.year]}")
    elif kind:
        lines.insert(1, f"projector: {kind}, which no release of MiniMind-V has beside a model of the {layout.year} layout")
    return lines
