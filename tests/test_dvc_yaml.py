"""dvc.yaml says what each stage reads; these tests hold it to that without running a stage."""

import ast
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.params import keys_of, load_for_stage, read_yaml

ROOT = Path(__file__).parent.parent
STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]

# Modules that cannot change an output: what they read is declared as params, and they only report. A stage does not
# depend on them, so mending an error message never re-trains a model.
REPORTING = {
    "pipeline/__init__.py",
    "stages/__init__.py",
    "pipeline/errors.py",
    "pipeline/launch.py",
    "pipeline/params.py",
    "pipeline/stage.py",
}


@cache
def imports_of(file: str) -> frozenset[str]:
    """Project files that a file imports, wherever in it the import stands."""
    names = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    paths = {name.replace(".", "/") for name in names if name.split(".")[0] in ("pipeline", "stages")}
    files = {f"{path}.py" for path in paths} | {f"{path}/__init__.py" for path in paths - {"pipeline", "stages"}}
    return frozenset(file for file in files if (ROOT / file).is_file())


def closure(file: str) -> set[str]:
    seen, todo = set(), [file]
    while todo:
        current = todo.pop()
        if current not in seen:
            seen.add(current)
            todo += imports_of(current)
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_everything_a_stage_imports_is_a_dependency(stage: str) -> None:
    imported = closure(f"stages/{stage}.py") - REPORTING
    listed = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert imported - listed == set(), "missing in dvc.yaml"
    assert listed - imported == set(), "listed in dvc.yaml, not imported"


def test_reporting_modules_depend_on_nothing_that_computes() -> None:
    for file in REPORTING - {"pipeline/stage.py"}:
        assert closure(file) <= REPORTING


def test_there_are_exactly_the_four_stages() -> None:
    assert list(STAGES) == ["extract", "tokenize", "pretrain", "sft"]


@pytest.mark.parametrize("stage", STAGES)
def test_commands_have_no_templates_and_run_as_modules(stage: str) -> None:
    assert STAGES[stage]["cmd"] == f"python -m stages.{stage}"


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_depends_on_a_throughput_knob(stage: str) -> None:
    assert not [key for key in STAGES[stage]["params"] if key.startswith("runtime")]


@pytest.mark.parametrize("stage", STAGES)
def test_declared_params_exist(stage: str) -> None:
    assert set(STAGES[stage]["params"]) <= set(keys_of())
    load_for_stage(stage, ROOT)


def test_params_file_survives_a_change_by_dvc() -> None:
    """`dvc exp run -S` rewrites params.yaml through ruamel; a file that is not its fixed point would show a false diff."""
    from io import StringIO

    yaml = YAML()
    yaml.width = 10_000
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    out = StringIO()
    yaml.dump(yaml.load(text), out)
    assert out.getvalue() == text


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_params_file_is_valid(file: Path) -> None:
    from pipeline.params import load

    load(file)
