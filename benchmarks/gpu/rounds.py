"""Sides take turns; a row of figures a side, and the epochs after which caching has paid for itself."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.clock import Window, held_bytes, kernel_seconds, peak_bytes, reset_peak, spread
from benchmarks.gpu.pairs import LIVE, PLAIN, STORED, Pair, make_sides
from benchmarks.gpu.runner import Figures
from benchmarks.gpu.sides import TrainingSide
from benchmarks.turns import rotated

ROUNDS, SECONDS = 3, 1.2  # turns of a side, and what each should last
BEFORE = {STORED: 2, LIVE: 4, PLAIN: 1}  # steps of a turn that are not clocked
RHYTHM = 4  # the live encoder works ahead, a call or 4 steps at a time: the clock starts and ends at the same place of that
PROFILED = {STORED: 4, LIVE: 8, PLAIN: 4}  # steps


@dataclass(frozen=True, slots=True)
class Turn:
    """What a turn of a side gave."""

    rate: float  # samples a second
    waiting: float
    peak: float | None  # GB


def measure_pair(pair: Pair, names: tuple[str, ...], limit: float) -> Figures:
    """Rows of all sides by name, their distances and, where both are there, the epochs to break even.

    `limit`: operations a second of the measured product. A side that fails is an error in its row; the others go on.
    """
    torch.compiler.reset()  # programs of another model would count against this one's
    sides, figures = make_sides(pair, names)
    rows: dict[str, Figures] = {}
    steps, turns = dict[str, int](), dict[str, list[Turn]]()
    for name, side in sides.items():
        try:
            steps[name], turns[name] = _steps(pair, name, side.warm_up()), []
        except Exception as error:
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:200]}
    _take_turns(pair, sides, steps, turns)
    for name in steps:
        rows[name] = _row(pair, name, sides[name], turns[name], limit)
    return figures | {"sides": rows} | _worth(pair, turns)


def _take_turns(pair: Pair, sides: dict[str, TrainingSide], steps: dict[str, int], turns: dict[str, list[Turn]]) -> None:
    """Rounds of all sides that could be warmed up, as many as there is time for, at least one."""
    spent = 0.0
    for number in range((1 if pair.bench.setting.tiny else ROUNDS) if steps else 0):
        if number and pair.bench.setting.left < 2 * spent:
            return
        began = time.perf_counter()
        for name in rotated(list(steps), number):
            turns[name].append(_turn(pair, name, sides[name], steps[name]))
        spent = time.perf_counter() - began


def _steps(pair: Pair, name: str, step: float) -> int:
    """Steps to clock, in the encoder's rhythm, so that they last about `SECONDS`; no more than the table has rows for."""
    wanted = RHYTHM if pair.bench.setting.tiny else SECONDS / step
    most = len(pair.table) // pair.batch_size - BEFORE[name]
    return max(RHYTHM, int(min(wanted, most)) // RHYTHM * RHYTHM)


def _turn(pair: Pair, name: str, side: TrainingSide, steps: int) -> Turn:
    """So many steps clocked; memory is the side's own, without what others hold meanwhile."""
    device, before = pair.bench.device, BEFORE[name]
    window = Window(before, before + steps, device)
    others = held_bytes(device) - side.weights()
    reset_peak(device)
    side.run(before + steps, window)
    peak = peak_bytes(device)
    return Turn(steps * pair.batch_size / window.seconds, window.waiting, None if peak is None else (peak - others) / 1e9)


def _row(pair: Pair, name: str, side: TrainingSide, turns: list[Turn], limit: float) -> Figures:
    device, flops, rates = pair.bench.device, pair.flops(live=name != STORED), [turn.rate for turn in turns]
    middle = statistics.median(rates)
    row: Figures = {
        "samples_per_second": spread(rates),
        "tokens_per_second": round(middle * pair.facts().tokens),
        "gflop_per_sample": round(flops / 1e9, 2),
        "share_of_product": round(middle * flops / limit, 4),
        "compiled": side.compiled,
        "compile_seconds": round(side.compile_seconds, 1),
    }
    if name != PLAIN:  # whose pixels are ready
        row["host_waiting"] = round(statistics.median(turn.waiting for turn in turns), 4)
    if turns[0].peak is not None:
        row["peak_gb"] = round(max(turn.peak or 0.0 for turn in turns), 2)
    if why := getattr(side, "why_not", ""):
        row["not_compiled_because"] = why
    busy = kernel_seconds(lambda: side.run(PROFILED[name], Window(0, 0, device)), device)
    if busy is not None:
        row["gpu_busy"] = round(busy / PROFILED[name] * middle / pair.batch_size, 3)
    return row


def _worth(pair: Pair, turns: dict[str, list[Turn]]) -> Figures:
    """How many times as fast stored features are, the median of the rounds' ratios, and after how many epochs they pay."""
    rates: dict[str, list[float]] = {name: [turn.rate for turn in found] for name, found in turns.items()}
    if not rates.get(STORED):
        return {}
    extraction = 1 / pair.bench.extracted(pair.name)["images_per_second"]
    found: dict[str, Any] = {"extraction_seconds_a_picture": float(f"{extraction:.4g}"), "stored_over": {}, "break_even_epochs": {}}
    stored = statistics.median(rates[STORED])
    for name in (LIVE, PLAIN):
        if rates.get(name):
            ratio = statistics.median(a / b for a, b in zip(rates[STORED], rates[name], strict=True))
            saved = 1 / statistics.median(rates[name]) - 1 / stored
            found["stored_over"][name] = round(ratio, 3)
            found["break_even_epochs"][name] = round(extraction / saved, 2) if saved > 0 else "never"
    return found
