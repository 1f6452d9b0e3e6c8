"""State of a training run that is not finished, so that the same command goes on where it stopped, bit for bit.

Lies outside DVC's outputs, which DVC deletes before a run, under the main checkout's .dvc/tmp/resume, so an experiment in
a temporary workspace finds it too. Its key is everything the result depends on: a state of other parameters, data or
weights is never picked up. Order, learning rate and random numbers are functions of the step, so weights, optimiser
moments and what was measured are all there is to keep.
"""

import json
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.core import (
    ARTEFACT,
    PipelineError,
    brief,
    fingerprint,
    is_held,
    main_checkout,
    map_tensors,
    publish_folder,
    verify,
    writing,
)
from pipeline.vlm.model import full_tensor, shard_like

DEPENDS = "depends.json"
KEPT = 3  # unfinished runs of a stage whose states are kept


class TrainingState:
    """The states of one run, in `folder`/`stage`-`key`; each is a folder named by its step.

    Args:
        depends: everything the result depends on; its hash is the key, so no other run's state is ever taken up.
    """

    def __init__(self, folder: Path, stage: str, depends: dict[str, Any]) -> None:
        self._parent, self.stage, self.depends = folder, stage, depends
        self.folder = folder / f"{stage}-{fingerprint(depends)}"

    def save(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        history: list[dict[str, float]],
        scaler: Any,
        *,
        heldout: list[dict[str, float]] | None = None,
        keep: Collection[int] = (),
        write: bool = True,
    ) -> None:
        """Write the state after `len(history)` steps whole or not at all; earlier ones of this run are then removed.

        `heldout`: held-out losses so far, kept with it. `keep`: steps of earlier states that stay.
        Of several processes all take part, since each may hold a part of every tensor, and one writes.
        """
        held = {f"model.{name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
        for number, state in optimizer.state_dict()["state"].items():
            held |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        tensors: dict[str, torch.Tensor] = {}
        for name, value in held.items():  # one at a time: what is not written is dropped at once
            found = full_tensor(value)
            if write:
                tensors[name] = found.cpu().contiguous().clone()
        if not write:
            return
        target = self.at(len(history))
        kept = {target.name, *(self.at(steps).name for steps in keep)}
        with publish_folder(target) as temporary, writing(target):
            save_file(tensors, temporary / "state.safetensors")
            notes = {"history": history, "heldout": heldout or [], "scaler": scaler.state_dict() if scaler is not None else None}
            (temporary / "state.json").write_text(json.dumps(notes), encoding="utf-8")
            about = {"depends": self.depends, "turn": 1 + max(map(_turn, self._others()), default=0)}
            (temporary / DEPENDS).write_text(json.dumps(about), encoding="utf-8")
        for path in self.folder.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)
        for path in self._others()[: 1 - KEPT]:
            if not is_held(path.name, locks()):
                shutil.rmtree(path, ignore_errors=True)

    def _others(self) -> list[Path]:
        """Folders of other unfinished runs of the stage, the one that saved last at the end; dates say nothing."""
        found = [path for path in self._parent.glob(f"{self.stage}-*") if path.name != self.folder.name]
        return sorted(found, key=lambda path: (_turn(path), path.name))

    def at(self, steps: int) -> Path:
        """Where the state after so many steps lies."""
        return self.folder / f"{steps:08d}"

    def saved(self) -> list[int]:
        """After how many steps there is a state."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdigit())

    def load(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: Any
    ) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Put the newest readable state into model and optimiser; returns history and held-out losses, empty when there is none."""
        for folder in sorted((path for path in self.folder.glob("[0-9]*") if path.is_dir()), reverse=True):
            try:
                verify(folder, remedy="")
                tensors = map_tensors(folder / "state.safetensors")
                notes = json.loads((folder / "state.json").read_text(encoding="utf-8"))
                if len(notes["history"]) != int(folder.name):
                    raise ValueError(f"holds the state after {len(notes['history'])} steps")
            except (PipelineError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                print(f"resume: {folder} is not whole and is passed over ({brief(error)})", flush=True)
                continue
            _put(model, tensors)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, number, part = name.split(".")
                    states.setdefault(int(number), {})[part] = shard_like(tensor, parameters[int(number)])
            optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
            if scaler is not None and notes["scaler"]:
                scaler.load_state_dict(notes["scaler"])
            return list(notes["history"]), list(notes.get("heldout", []))
        self._name_differences()
        return [], []

    def take(self, model: torch.nn.Module, steps: int) -> None:
        """The weights of the state after so many steps; raises `PipelineError` where it cannot be read."""
        path = self.at(steps) / "state.safetensors"
        try:
            verify(path.parent, remedy=f"remove {self.folder} and run again")
            _put(model, map_tensors(path))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            remedy = f"remove {self.folder} and run again"
            raise PipelineError(
                f"the best state cannot be read: {brief(error)}", where=str(path), remedy=remedy, code=ARTEFACT
            ) from None

    def _name_differences(self) -> None:
        """Say why the state of an unfinished run that is there is not taken up."""
        found = [state / DEPENDS for run in self._others() for state in sorted(run.glob("[0-9]*")) if (state / DEPENDS).is_file()]
        if not found:
            return
        try:
            other = _flat(json.loads(found[-1].read_text(encoding="utf-8"))["depends"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        mine = _flat(json.loads(json.dumps(self.depends)))
        differ = [f"{key} {_short(other.get(key))} -> {_short(mine.get(key))}" for key in mine if other.get(key) != mine[key]]
        print(f"resume: {found[-1].parent} is of another run ({', '.join(differ[:3])}), so this one starts afresh", flush=True)

    def clear(self) -> None:
        """The run is finished: its states are of no more use."""
        shutil.rmtree(self.folder, ignore_errors=True)


def locks() -> Path:
    """Where a training run is locked by the name of its states' folder."""
    return main_checkout() / ".dvc" / "tmp" / "locks"


def _turn(folder: Path) -> int:
    """When a run saved, counted over the runs of its stage: above those that had saved before it; 0 where that is not known."""
    found = 0
    for path in folder.glob(f"*/{DEPENDS}"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = max(found, int(json.loads(path.read_text(encoding="utf-8"))["turn"]))
    return found


def _put(model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(shard_like(tensors[f"model.{name}"], parameter))


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix: content}
    return {key: value for name, part in content.items() for key, value in _flat(part, f"{prefix}.{name}".lstrip(".")).items()}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 20 else f"{text[:12]}…"
