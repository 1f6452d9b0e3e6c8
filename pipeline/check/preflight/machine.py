"""Memory and disk that training will take, from the number of parameters alone."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.check.preflight.findings import Finding
from pipeline.check.preflight.project import Project
from pipeline.core import PipelineError, main_checkout
from pipeline.core.devices import pick_device, pick_precision
from pipeline.vlm.model import decoder_layers

TRAINED = 16  # bytes a parameter that trains: float32 weight, gradient, two moments of Adam
GB = 1e9


def check_memory(project: Project) -> Iterator[Finding]:
    """A note where weights, gradients and optimiser alone are more than the device has."""
    model, runtime = project.model, project.params.runtime
    if model is None:
        return
    try:
        device = pick_device(runtime.device)
    except PipelineError as error:
        yield Finding.of(error)
        return
    for name, training, _ in project.trainings():
        trained, all_of = counts(model, training.train)
        try:
            halved = pick_precision(training.precision, device) == "bfloat16" and training.train != "all"
        except PipelineError as error:
            yield Finding(error.what, f"{name}.precision", error.remedy)
            continue
        needed = trained * TRAINED + (all_of - trained) * (2 if halved else 4)
        if runtime.fsdp:
            needed //= runtime.processes
        if device.type == "cpu":
            needed *= runtime.processes
        has = memory(device)
        if has and needed > has:
            remedy = f"choose a smaller llm.model, set {name}.train: projector, or share it: runtime.fsdp: true"
            what = f"weights and optimiser take {needed / GB:,.1f} GB before a row is seen, {device} has {has / GB:,.1f} GB"
            yield Finding(what, name, remedy, note=True)


def check_disk(project: Project) -> Iterator[Finding]:
    """A fault where the models that training saves, and the state that it can go on from, have no room."""
    model = project.model
    if model is None:
        return
    models = state = 0
    for _, training, _ in project.trainings():
        trained, all_of = counts(model, training.train)
        models += 4 * all_of if trained else 0
        state = max(state, 12 * trained)
    for folder, needed in ((Path(), models), (main_checkout() / ".dvc", state)):
        free = shutil.disk_usage(folder if folder.is_dir() else Path()).free
        if needed > free:
            what = f"training saves {needed / GB:,.1f} GB here, {free / GB:,.1f} GB are free"
            yield Finding(what, str(folder.resolve()), "make room, or choose a smaller llm.model")


def counts(model: Any, train: str) -> tuple[int, int]:
    """Parameters of the language model that train, and all of them."""
    every = sum(parameter.numel() for parameter in model.parameters())
    if train == "projector":
        return 0, every
    if train == "all":
        return every, every
    layers = decoder_layers(model)
    return sum(parameter.numel() for layer in (layers[0], layers[-1]) for parameter in layer.parameters()), every


def memory(device: torch.device) -> int:
    """Bytes that a device has; 0 where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
