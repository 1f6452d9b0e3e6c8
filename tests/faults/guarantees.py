"""The figures of `make faults` in docs/guarantees.md, written from benchmarks/results/faults.json and never by hand.

python tests/faults/guarantees.py
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FIGURES, PAGE = ROOT / "benchmarks/results/faults.json", ROOT / "docs/guarantees.md"
BEGIN, END = "<!-- written by tests/faults/guarantees.py -->\n", "<!-- to here -->\n"
WHAT = {
    "kills": "stages killed with -9 at random moments that ended with the bits of an undisturbed run",
    "points": "calls that change a file, of the system and of Python, killed once or failed once with ENOSPC or EIO: safe",
    "diskfull": "full disks and limits on the size of files: one line, and completed with room",
    "power": "states after a loss of power; controls without a sync that fail",
    "flips": "flipped bits and cuts noticed, with the file named",
    "fuzz": "damaged inputs; not used, nor refused in one line within 10 s and 2 GB",
    "guards": "guards taken out that a test missed",
    "overhead": "most of a stage's processor time that checksums took",
}
FORMS = {
    "kills": "{kills_identical:,} of {kills_total:,}",
    "points": "{syscall_points_safe:,} of {syscall_points_total:,}",
    "diskfull": "{diskfull_recovered:,} of {diskfull_total:,}",
    "power": "{powerloss_states:,}, {powerloss_bad:,} bad; {negative_controls_failing} of 3",
    "flips": "{bitflips_detected:,} of {bitflips_total:,}, {bitflips_kinds} kinds",
    "fuzz": "{fuzzed_inputs:,}; {fuzz_failures:,}",
    "guards": "{guards_removed_caught:,} of {guards_removed_total:,}",
    "overhead": "{verify_overhead:.2%}",
}


def table(found: dict[str, Any]) -> str:
    """A row for each figure that is there, with its commit, and how far its section came where that was not to the end."""
    lines = ["| section | what | figure | commit |", "|---|---|---|---|"]
    for name, what in WHAT.items():
        try:
            value = FORMS[name].format(**found["figures"])
        except KeyError:
            lines.append(f"| `{name}` | {what} | not run | |")
            continue
        section = found.get("sections", {}).get(name, {})
        if section and section["done"] < section["of"]:
            value += f" ({section['done']:,} of {section['of']:,} trials)"
        first = FORMS[name].partition("{")[2].partition(":")[0]
        source = section or found.get("older", {}).get(first, found)
        lines.append(f"| `{name}` | {what} | {value} | {source['commit']} |")
    return "\n".join(lines) + "\n"


def page(found: dict[str, Any], text: str) -> str:
    """`text` with the table in its place."""
    before, _, rest = text.partition(BEGIN)
    return before + BEGIN + "\n" + table(found) + "\n" + END + rest.partition(END)[2]


def write(figures: Path = FIGURES) -> None:
    """Put the figures into the page."""
    found = json.loads(figures.read_text(encoding="utf-8"))
    PAGE.write_text(page(found, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write()
