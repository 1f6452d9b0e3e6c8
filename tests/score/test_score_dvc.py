"""score/dvc.yaml under the real DVC: nothing as it comes, a task by `dvc exp run -S`, its figures in `dvc exp show`."""

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import World
from made_benchmarks import rows_of, write_copy
from projects import ROOT, with_path
from scored_models import make_project, save_model

from pipeline.params.reading import read_yaml

STAGE = read_yaml(ROOT / "score/dvc.yaml")["stages"]["score"]["do"]


def test_a_stage_depends_on_all_the_code_that_decides_a_score() -> None:
    import grimp

    graph = grimp.build_graph("pipeline")
    imported = graph.find_upstream_modules("pipeline.score.command") | {"pipeline.score.command"}
    listed = [dep.removesuffix(".py").replace("/", ".") for dep in STAGE["deps"] if dep.startswith("pipeline/")]

    def is_covered(module: str) -> bool:
        return any(module == dep or module.startswith(f"{dep}.") for dep in listed)

    left = {module for module in imported if not is_covered(module) and not module.startswith("pipeline.params")}
    assert left <= {"pipeline", "pipeline.chat"}, "missing in score/dvc.yaml"
    assert [dep for dep in listed if not any(module == dep or module.startswith(f"{dep}.") for module in imported)] == []
    assert len(STAGE["deps"]) <= 12


@pytest.mark.slow
def test_an_experiment_is_scored_when_it_is_asked_to_be(world: World, tmp_path: Path, png: Callable[[int], bytes]) -> None:
    def run(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": with_path(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shown() -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(run("dvc", "exp", "show", "--csv"))))

    make_project(world, tmp_path)
    write_copy(tmp_path / "benchmarks/pope", "pope", rows_of("pope", 8), png)
    save_model(world, tmp_path / "models/sft", seed=1)
    for dep in STAGE["deps"][2:]:
        (tmp_path / dep).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / dep).symlink_to(ROOT / dep)
    (tmp_path / ".gitignore").write_text("models\nresults\nbenchmarks\npipeline\n.*.tmp\n")
    run("git", "init", "-q")
    for key, value in (("user.name", "a"), ("user.email", "a@b.c")):
        run("git", "config", key, value)
    run("dvc", "init", "-q")
    run("git", "add", "-A")
    run("git", "commit", "-qm", "as it comes")
    assert "changed" not in run("dvc", "status"), "as it comes there is nothing to score"
    assert not any(name.startswith("pope") for name in shown()[0])
    run("dvc", "exp", "run", "-q", "score/dvc.yaml", "-S", "score/params.yaml:+tasks.pope=benchmarks/pope")
    found = shown()[0]
    assert found["pope.questions"] == "8"
    assert {"pope.accuracy", "pope.accuracy_blind", "pope.f1_low"} <= found.keys()
    assert "didn't change, skipping" in run("dvc", "repro", "score/dvc.yaml")
