"""Arguments, files and terminals that are not UTF-8: any command ends well or in one line, whatever it has to print."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAME = b"caf\xe9".decode("utf-8", "surrogateescape")
ROW = b'{"conversations": [{"from": "human", "value": "%s"}, {"from": "gpt", "value": "b"}]}'
FILES = {
    f"{NAME}.jsonl": ROW % b"a" + b"\n",
    "latin.csv": b"image,text\na.png,caf\xe9\n",
    "utf16.csv": b"\xff\xfei\0m\0",
    "latin.json": b"[" + ROW % b"caf\xe9" + b"]",
}
QUICK = [["params", f"{NAME}=1"], ["params", f"llm.model={NAME}"], ["chat", "--model", NAME, "x"]]
SLOW = [
    *(["check", name] for name in FILES), ["check", "--params", f"{NAME}.yaml"],
    ["check", f"{NAME}.jsonl", "--html", f"{NAME}.html"],
    ["chat", "--seed", NAME], ["chat", NAME, NAME], ["export", NAME, "out"], ["features", "info", NAME],
    ["features", "show", "--count", NAME], ["from_gguf", f"{NAME}.jsonl", "out"], ["minimind", "import", NAME, "out"], ["report"],
    ["records", "repack", NAME, "out"], ["web", "--model", NAME],
]  # fmt: skip


def run(command: list[str], encoding: str, folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    for name in ("params.yaml", "dvc.yaml", "data", "metrics"):
        (folder / name).symlink_to(ROOT / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    started = [sys.executable, "-m", f"pipeline.{command[0]}", *command[1:]]
    done = subprocess.run(started, cwd=folder, env=environment, capture_output=True, stdin=subprocess.DEVNULL)
    assert done.returncode in (0, 2, 3, 4), done.stderr
    assert b"Traceback" not in done.stderr
    assert b"unexpected" not in done.stderr
    if done.returncode and b"Usage:" not in done.stderr:
        assert done.stderr.strip().splitlines()[-1].startswith(b"error: ")


@pytest.mark.parametrize("command", QUICK, ids=lambda command: command[0])
def test_a_quick_command_survives_text_that_is_none(command: list[str], tmp_path: Path) -> None:
    run(command, "ascii", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("command", SLOW, ids=lambda command: ascii(" ".join(command)))
def test_every_command_survives_text_that_is_none(command: list[str], encoding: str, tmp_path: Path) -> None:
    run(command, encoding, tmp_path)
