"""What crashes leave behind is found, told with its remedy, and mended where no work can be lost."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from projects import with_path

from pipeline.core.files import publish_folder, temporary_name
from pipeline.doctor import CHECKS, Finding
from pipeline.doctor.command import examine

ROOT = Path(__file__).parents[2]
Spoil = Callable[[Path], object]


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with nothing wrong: this project's own two files, a model, an output that DVC's cache holds."""
    folder = tmp_path_factory.mktemp("checkout") / "main"
    folder.mkdir()
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("clip", "llm"):
        (folder / "data/models" / name).mkdir(parents=True)
        (folder / "data/models" / name / "config.json").write_text("{}")
    (folder / "data/tokens").mkdir()
    (folder / "data/tokens/a").write_text("whole")
    md5 = hashlib.md5(b"whole").hexdigest()
    (folder / ".dvc/cache/files/md5" / md5[:2]).mkdir(parents=True)
    os.link(folder / "data/tokens/a", folder / ".dvc/cache/files/md5" / md5[:2] / md5[2:])
    (folder / ".dvc/config").write_text("")
    (folder / ".gitignore").write_text("/data\n.dvc/tmp\n.dvc/cache\n.dvc/features\nmodels\n")
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "first")
    return folder


@pytest.fixture
def checkout(clean: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-a", str(clean), str(tmp_path / "main")], check=True)  # with its hard links
    return tmp_path / "main"


def left_by_the_dead(path: Path) -> Path:
    """The temporary name that a process gave which is dead by now."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return path.with_name(temporary_name(path).name.replace(f".{os.getpid()}@", f".{process.pid}@"))


def detach(folder: Path) -> None:
    git(folder, "checkout", "-q", "--detach")
    git(folder, "update-ref", "refs/exps/exec/EXEC_HEAD", "HEAD")


def change_params(folder: Path) -> None:
    path = folder / "params.yaml"
    path.write_text(path.read_text().replace("lr: 1.0e-3", "lr: 2.0e-3", 1))


def leak_workspace(folder: Path) -> None:
    (folder / ".dvc/tmp/exps/standalone/tmpabc").mkdir(parents=True)
    (folder / ".dvc/tmp/exps/standalone/tmpabc/file").write_bytes(bytes(2_000_000))


def lock(folder: Path, text: str) -> None:
    (folder / ".dvc/tmp").mkdir(exist_ok=True)
    (folder / ".dvc/tmp/rwlock").write_text(text)


def lock_of_the_dead(folder: Path) -> None:
    pid = int(left_by_the_dead(folder / "x").name.split(".")[-2].partition("@")[0])
    lock(folder, json.dumps({"data/features": {"write": {"pid": pid, "cmd": "dvc repro"}}}))


def write_into_output(folder: Path) -> None:
    (folder / "data/tokens/a").write_text("other")


def leave_file(folder: Path) -> None:
    left_by_the_dead(folder / "data/features_rejected.csv").write_text("half")


def leave_folder(folder: Path) -> None:
    (left_by_the_dead(folder / "data/tokens")).mkdir()


def leave_state(folder: Path) -> None:
    (folder / ".dvc/tmp/resume/sft-0123/00000042").mkdir(parents=True)
    (folder / ".dvc/tmp/resume/sft-0123/00000042/state.safetensors").write_bytes(bytes(3_000_000))


def leave_store(folder: Path) -> None:
    (folder / ".dvc/features/0123").mkdir(parents=True)
    (folder / ".dvc/features/0123/a.h5").write_bytes(bytes(4_000_000))


def lose_model(folder: Path) -> None:
    shutil.rmtree(folder / "data/models/llm")


def leave_pointer(folder: Path) -> None:
    (folder / "data/models/clip/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


LEFT: list[tuple[Spoil, str, str, bool]] = [  # what happens, what is told, what mends it, and whether --fix does
    (detach, "a killed `dvc exp run` left HEAD on no branch", "git checkout -f main && dvc checkout", False),
    (lambda at: git(at, "update-ref", "refs/exps/exec/EXEC_HEAD", "HEAD"), "1 references of a killed", "update-ref -d", True),
    (change_params, "params.yaml differs from the commit: pretrain.lr 0.001 -> 0.002", "git checkout params.yaml", False),
    (leak_workspace, ".dvc/tmp/exps/standalone/tmpabc: workspace of a killed experiment, 2.0 MB", "rm -rf .dvc/tmp", True),
    (lambda at: lock(at, "{"), ".dvc/tmp/rwlock: not readable as JSON", "rm .dvc/tmp/rwlock", True),
    (lock_of_the_dead, ".dvc/tmp/rwlock: locks of process", "rm .dvc/tmp/rwlock", True),
    (write_into_output, "it was written into through data/tokens/a", "then dvc checkout or dvc repro", True),
    (leave_file, "data/.features_rejected.csv.", "rm -r data/.features_rejected.csv", True),
    (leave_folder, "data/.tokens.", "rm -r data/.tokens", True),
    (
        leave_state,
        ".dvc/tmp/resume/sft-0123: sft stopped after step 42, 0 days ago, 3.0",
        "rm -r .dvc/tmp/resume/sft-0123",
        False,
    ),
    (leave_store, ".dvc/features/0123: features that no output", "rm -r .dvc/features/0123", False),
    (lose_model, "llm.model: data/models/llm is no folder with a model", "git checkout data/models/llm", False),
    (leave_pointer, "data/models/clip/model.safetensors: a pointer of Git LFS", "git lfs pull", False),
]


def found(folder: Path) -> list[Finding]:
    return list(examine(folder))


def test_a_clean_checkout_has_no_finding(checkout: Path) -> None:
    assert found(checkout) == []


@pytest.mark.parametrize(("spoil", "told", "remedy", "mends"), LEFT)
def test_what_is_left_is_told_with_its_remedy_and_mended_where_nothing_is_lost(
    spoil: Spoil, told: str, remedy: str, mends: bool, checkout: Path
) -> None:
    spoil(checkout)
    (finding,) = found(checkout)
    assert told in finding.what
    assert remedy in finding.remedy
    assert (finding.mend is not None) == mends
    if finding.mend:
        finding.mend()
        assert found(checkout) == []


def test_every_check_is_tried_but_those_of_running_processes_and_of_the_machine() -> None:
    assert len(CHECKS) == 13


def test_what_belongs_to_the_living_is_left_alone(checkout: Path) -> None:
    lock(checkout, json.dumps({"data/features": {"write": {"pid": os.getpid(), "cmd": "dvc repro"}}}))
    leak_workspace(checkout)
    inside = subprocess.Popen(["sleep", "60"], cwd=checkout / ".dvc/tmp/exps/standalone/tmpabc")
    try:
        with publish_folder(checkout / "data/tokens"):
            assert found(checkout) == []
    finally:
        inside.kill()
        inside.wait()


def test_a_stage_without_a_parent_is_told(checkout: Path) -> None:
    code = (
        "import subprocess, sys; words = [sys.executable, '-c', 'import time; time.sleep(60)', 'stages.sft']\n"
        "print(subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    process = int(subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, check=True).stdout)
    try:
        time.sleep(0.1)
        reaper = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        told = [finding for finding in found(checkout) if finding.remedy == f"kill {process}"]
        assert len(told) == (reaper == 1)
    finally:
        os.kill(process, signal.SIGKILL)


def test_the_command_tells_mends_and_ends_with_what_is_left(checkout: Path) -> None:
    leave_file(checkout)
    change_params(checkout)

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipeline.doctor", "--quick", *options]
        environment = {**os.environ, "PYTHONPATH": with_path(ROOT)}
        return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)

    done = run("--fix")
    assert done.returncode == 4
    assert "-> done: rm -r data/.features_rejected.csv" in done.stdout
    assert "pretrain.lr 0.001 -> 0.002" in done.stdout
    assert done.stderr == "error: 1 things to look at -> see above\n"
    git(checkout, "checkout", "params.yaml")
    assert (run().returncode, run().stderr) == (0, "")
