"""Sides of the engine's benchmark that take turns, each turn a process of its own (benchmarks.sides)."""

import json
import os
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from rich.console import Console

from benchmarks.sides import Turn
from benchmarks.world import World
from pipeline.core.errors import RESOURCE, PipelineError

T = TypeVar("T")


def rotated(sides: list[T], number: int) -> list[T]:
    """The order of round `number`: in each another side goes first."""
    at = number % len(sides)
    return sides[at:] + sides[:at]


@dataclass(frozen=True, slots=True)
class Found:
    """A side's turns: what each process told."""

    turns: list[dict[str, Any]]

    def rates(self) -> list[float]:
        """Samples a second of each turn."""
        return [turn["samples"] / turn["seconds"] for turn in self.turns]

    def middle(self, name: str) -> float:
        return statistics.median(turn[name] for turn in self.turns)

    def rate(self) -> float:
        return statistics.median(self.rates())

    def over(self, other: "Found") -> float:
        """How many times as fast: the median of the rounds' ratios."""
        return round(statistics.median(a / b for a, b in zip(self.rates(), other.rates(), strict=True)), 3)


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts need: the world, the sizes, and where to say what is going on."""

    world: World
    models: list[str]
    rows: int
    rounds: int
    console: Console

    def take_turns(self, sides: dict[str, Turn]) -> dict[str, Found]:
        """Every side once in each round; the order rotates."""
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for number in range(self.rounds):
            for name, turn in rotated(list(sides.items()), number):
                found[name].append(self.run(turn))
                seconds = found[name][-1].get("seconds", 0.0)
                self.console.print(f"[dim]round {number + 1}/{self.rounds}  {name}  {seconds:.1f} s[/dim]", highlight=False)
        return {name: Found(turns) for name, turns in found.items()}

    def run(self, turn: Turn) -> dict[str, Any]:
        """One turn in a fresh process; raises `PipelineError` when it fails, having shown what it said."""
        command = [sys.executable, "-m", "benchmarks.sides", json.dumps(asdict(turn))]
        # the stages' own limit on what oneDNN remembers of shapes, for all sides alike
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        print(done.stderr[-3000:], file=sys.stderr)
        killed = done.returncode == -signal.SIGKILL
        raise PipelineError(
            "was killed, most likely for memory" if killed else f"ended with {done.returncode}",
            where=f"{turn.side}, {turn.stage}, {turn.model}",
            remedy="give --model minimind, which needs less" if killed else "see what it said above",
            code=RESOURCE,
        )

    def turn(self, side: str, **settings: Any) -> Turn:
        return Turn(world=str(self.world.folder), side=side, **settings)
