"""`make faults`: faults put into the real stages and writers by the hundred, and what came of them.

    python tests/faults/long.py [kills points diskfull power flips fuzz guards]

Each section is a portion; its figures are merged into benchmarks/results/faults.json with the machine and the commit. Faults
are put in from within the process, in Python's calls that change files (`benchmarks.kills.watch`); what libraries write by
themselves meets a limit of file sizes (`diskfull`). Figures are counts, and a number that was not reached stands as it is.
"""

import errno
import random
import tempfile
import warnings
from pathlib import Path
from typing import Annotated

import flips
import fuzz
import guards
import powerloss
import stage_kills
import torch
import typer
import writers
from tqdm import tqdm

from benchmarks.figures import record
from benchmarks.kills import FREES, Trials, run
from pipeline.core import quiet_libraries, run_command

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/faults.json"
CONTROLS = ({"files": False}, {"folders": False}, {"files": False, "folders": False})
Figures = dict[str, int]


def _tell(problems: list[str]) -> int:
    for problem in problems[:20]:
        tqdm.write(problem)
    return len(problems)


def kills(scratch: Path, amount: int, rng: random.Random) -> Figures:
    count = amount or 400
    found = stage_kills.StageKills(scratch, ROOT)
    bad = _tell(stage_kills.random_kills(found, count, rng))
    return {"kills_identical": count - bad, "kills_total": count}


def points(scratch: Path, _: int, __: random.Random) -> Figures:
    """Every call of every writer killed once, half-way where it can stop there, and failed once with ENOSPC and with EIO."""
    problems, total = list[str](), 0
    for kind, steps in writers.STEPS.items():
        trials = Trials(steps, scratch, strict=False)
        jobs = [trials.kill_at(*point) for point in tqdm(trials.points(), desc=f"{kind}: kills", mininterval=5)]
        for number in (errno.ENOSPC, errno.EIO):
            calls = [at for at, name in enumerate(trials.calls) if number == errno.EIO or name not in FREES]
            jobs += [trials.fail_at(at, number) for at in tqdm(calls, desc=f"{kind}: {errno.errorcode[number]}", mininterval=5)]
        problems += [f"{kind}: {problem}" for problem in jobs if problem]
        total += len(jobs)
    return {"syscall_points_safe": total - _tell(problems), "syscall_points_total": total}


def diskfull(scratch: Path, amount: int, _: random.Random) -> Figures:
    """No file may grow beyond a size, 1 byte to that of the largest: one line, and the next run, with room, completes."""
    problems, total = list[str](), 0
    for kind, steps in writers.STEPS.items():
        trials = Trials(steps, scratch, strict=False)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            for step in steps:
                run(lambda step=step, folder=folder: step(Path(folder)))
            largest = max(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        sizes = [1 + (largest - 2) * step // max(1, (amount or 12) - 1) for step in range(amount or 12)]
        problems += [f"{kind}: {problem}" for size in sizes if (problem := trials.limit_files(size))]
        total += len(sizes)
    return {"diskfull_recovered": total - _tell(problems), "diskfull_total": total}


def power(scratch: Path, amount: int, rng: random.Random) -> Figures:
    count = (amount or 10_000) // len(writers.STEPS)
    bad, failing = 0, [0, 0, 0]
    for kind in writers.STEPS:
        (scratch / kind).mkdir()
        found = powerloss.record(lambda folder, kind=kind: writers.write(kind, folder), scratch / kind)
        bad += powerloss.bad_states(found, count, rng.randrange(1 << 30))
        for number, control in enumerate(CONTROLS):
            failing[number] += powerloss.bad_states(found, count, rng.randrange(1 << 30), **control) > 0
    caught = sum(kinds == len(writers.STEPS) for kinds in failing)  # a control counts where every writer needs the sync
    return {"powerloss_states": count * len(writers.STEPS), "powerloss_bad": bad, "negative_controls_failing": caught}


def flip(scratch: Path, amount: int, rng: random.Random) -> Figures:
    problems, total = list[str](), 0
    for kind in flips.READERS:
        (scratch / kind).mkdir()
        artefact, bits, cuts = flips.Artefact(kind, scratch / kind), amount or 3000, (amount or 3000) // 15
        found = [artefact.flip(rng) for _ in tqdm(range(bits), desc=f"{kind}: bits", mininterval=5)]
        found += [artefact.cut(rng) for _ in range(cuts)]
        problems += [f"{kind}: {problem}" for problem in found if problem]
        total += bits + cuts
    return {"bitflips_detected": total - _tell(problems), "bitflips_total": total, "bitflips_kinds": len(flips.READERS)}


def fuzzing(scratch: Path, amount: int, rng: random.Random) -> Figures:
    total, problems = 0, list[str]()
    for border, share in (("pictures", 1.0), ("rows", 0.48), ("tables", 0.05), ("params", 0.01)):
        done, failures = fuzz.fuzz(border, int(share * (amount or 100_000)), rng, scratch)
        total, problems = total + done, problems + failures
    return {"fuzzed_inputs": total, "fuzz_failures": _tell(problems)}


def guard(scratch: Path, amount: int, _: random.Random) -> Figures:
    copy = guards.copy_sources(ROOT, scratch / "copy")
    chosen = guards.GUARDS[: amount or None]
    found = [guards.take_out(each, ROOT, copy) for each in tqdm(chosen, desc="guards", mininterval=5)]
    return {
        "guards_removed_caught": len(chosen) - _tell([problem for problem in found if problem]),
        "guards_removed_total": len(chosen),
    }


SECTIONS = {"kills": kills, "points": points, "diskfull": diskfull, "power": power, "flips": flip, "fuzz": fuzzing, "guards": guard}


def main(
    sections: Annotated[list[str] | None, typer.Argument(help=f"Of {', '.join(SECTIONS)}. Without: all.")] = None,
    amount: Annotated[int, typer.Option(min=0, help="Trials of a section; 0 = its own number.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the random moments, bits and inputs.")] = 0,
    results: Annotated[Path, typer.Option(help="Where the figures go.")] = RESULTS,
) -> None:
    """Put faults in, count what comes of them."""
    quiet_libraries()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a forked process has one
    writers.prepare()
    for name in sections or list(SECTIONS):
        with tempfile.TemporaryDirectory() as scratch:
            figures = SECTIONS[name](Path(scratch), amount, random.Random(seed))
        record(results, figures)
        print(name, figures, flush=True)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
