"""The sections of `make faults`: each a number of trials that know nothing of each other, so that a run can go on anywhere."""

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import disks
import flips
import fuzz
import guards
import overhead
import powerloss
import stage_kills
import syscalls
import writers

from benchmarks.kills import FREES, Trials

CONTROLS = ({"files": False}, {"folders": False}, {"files": False, "folders": False})
BATCH = 100  # damaged artefacts of a trial
INPUTS = 500  # fuzzed inputs of a trial


@dataclass(frozen=True, slots=True)
class Found:
    """What a trial adds to the figures, or the most that any has seen, and what went wrong."""

    figures: dict[str, int]
    problems: list[str] = field(default_factory=list)
    most: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """So many trials, each by its number."""

    trials: int
    trial: Callable[[int], Found]


def _judged(problem: str, right: str, total: str) -> Found:
    return Found({right: int(not problem), total: 1}, [problem] if problem else [])


def kills(scratch: Path, root: Path, amount: int, seed: int) -> Section:
    found = stage_kills.StageKills(scratch, root)

    def trial(number: int) -> Found:
        share = random.Random(f"{seed}, {number}").uniform(0.02, 1.0)
        return _judged(found.kill(number % len(stage_kills.STAGES), share), "kills_identical", "kills_total")

    return Section(amount or 400, trial)


def points(scratch: Path, _: Path, amount: int, seed: int) -> Section:
    """Every call of every writer that changes a file killed once and failed once with ENOSPC and with EIO.

    First the system's calls, then Python's, which can also stop half-way through.
    """
    writers.prepare()
    jobs: list[Callable[[], str]] = []
    for kind, steps in writers.STEPS.items():
        trials = Trials(steps, scratch, strict=False)
        mine: list[Callable[[], str]] = []
        if syscalls.can_trace():
            system = syscalls.Syscalls(trials, scratch)
            mine += [partial(system.kill, call) for call in system.points]
            mine += [partial(system.fail, call, errno.EIO) for call in system.points]
            mine += [partial(system.fail, call, errno.ENOSPC) for call in system.points if call.name not in syscalls.FREES]
        mine += [partial(trials.kill_at, *point) for point in trials.points()]
        mine += [partial(trials.fail_at, at, errno.EIO) for at in range(len(trials.calls))]
        mine += [partial(trials.fail_at, at, errno.ENOSPC) for at, name in enumerate(trials.calls) if name not in FREES]
        jobs += [partial(_named, kind, job) for job in mine]
    chosen = random.Random(seed).sample(jobs, min(amount, len(jobs))) if amount else jobs
    return Section(len(chosen), lambda number: _judged(chosen[number](), "syscall_points_safe", "syscall_points_total"))


def _named(kind: str, job: Callable[[], str]) -> str:
    problem = job()
    return f"{kind}: {problem}" if problem else ""


def diskfull(scratch: Path, root: Path, amount: int, _: int) -> Section:
    """A disk with too little room, for every writer and every stage; where none can be mounted, a limit on the size of files."""
    writers.prepare()
    jobs: list[Callable[[], str]] = []
    shares = [number / 8 for number in range(8)] if not amount else [0.5]
    can_mount = disks.can_mount(scratch)
    for kind, steps in writers.STEPS.items():
        trials = Trials(steps, scratch, strict=False)
        with trials.folder() as folder:
            trials.work(folder)
            largest = max(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        limits = [partial(trials.limit_files, int(share * (largest - 1))) for share in shares[:: 4 if can_mount else 1]]
        filled = [partial(disks.fill_writer, trials, scratch, share) for share in shares] if can_mount else []
        jobs += [partial(_named, kind, job) for job in (*limits, *filled)]
    if can_mount:
        stages = stage_kills.StageKills(scratch / "stages", root)
        jobs += [partial(disks.fill_stage, stages, number, scratch, share) for number in range(4) for share in shares]
    return Section(len(jobs), lambda number: _judged(jobs[number](), "diskfull_recovered", "diskfull_total"))


def power(scratch: Path, _: Path, amount: int, seed: int) -> Section:
    """States of every writer, then the controls: one counts where every writer needs the sync."""
    writers.prepare()
    count, found = (amount or 10_000) // len(writers.STEPS), []
    for kind in writers.STEPS:
        (scratch / kind).mkdir()
        found.append(powerloss.record(partial(writers.write, kind), scratch / kind))

    def trial(number: int) -> Found:
        if number < len(found):
            bad = powerloss.bad_states(found[number], count, seed + number)
            return Found({"powerloss_states": count, "powerloss_bad": bad}, [f"{number}: {bad} states"] if bad else [])
        control = CONTROLS[number - len(found)]
        fails = all(powerloss.bad_states(each, count, seed, **control) for each in found)
        return Found({"negative_controls_failing": int(fails)}, [] if fails else [f"nobody misses {control}"])

    return Section(len(found) + len(CONTROLS), trial)


def flip(scratch: Path, _: Path, amount: int, seed: int) -> Section:
    writers.prepare()
    for kind in flips.READERS:
        (scratch / kind).mkdir()
    folders = {kind: flips.artefact(kind, scratch / kind) for kind in flips.READERS}
    kinds, cuts = list(folders), BATCH // 16

    def trial(number: int) -> Found:
        kind = kinds[number % len(kinds)]
        problems = flips.unnoticed(folders[kind], flips.READERS[kind], flips=BATCH - cuts, cuts=cuts, seed=seed + number)
        figures = {"bitflips_detected": BATCH - len(problems), "bitflips_total": BATCH}
        return Found(figures, [f"{kind}: {problem}" for problem in problems], {"bitflips_kinds": len(kinds)})

    return Section(-(-(amount or 3400) // BATCH) * len(kinds), trial)


def fuzzing(scratch: Path, _: Path, amount: int, seed: int) -> Section:
    """Inputs at every border, in processes of their own: one that dies or grows is a failure too."""
    batches = fuzz.batches(amount or 150_000, INPUTS)

    def trial(number: int) -> Found:
        border, count = batches[number]
        done, failures, memory = fuzz.apart(border, count, f"{seed}, {number}", scratch)
        return Found({"fuzzed_inputs": done, "fuzz_failures": len(failures)}, failures, {"fuzz_memory_mb": memory >> 20})

    return Section(len(batches), trial)


def guard(scratch: Path, root: Path, amount: int, _: int) -> Section:
    copy, chosen = guards.copy_sources(root, scratch / "copy"), guards.GUARDS[: amount or None]
    return Section(
        len(chosen),
        lambda number: _judged(guards.take_out(chosen[number], root, copy), "guards_removed_caught", "guards_removed_total"),
    )


def verifying(scratch: Path, root: Path, _: int, __: int) -> Section:
    """The dearest share of a stage's processor time that goes into checksums, on the whole embedded world."""
    found = overhead.Overhead(scratch, root)
    return Section(len(stage_kills.STAGES), lambda number: Found({}, most={"verify_overhead": found.share(number)}))


SECTIONS: dict[str, Callable[[Path, Path, int, int], Section]] = {
    "kills": kills, "points": points, "diskfull": diskfull, "power": power, "flips": flip, "fuzz": fuzzing, "guards": guard,
    "overhead": verifying,
}  # fmt: skip
