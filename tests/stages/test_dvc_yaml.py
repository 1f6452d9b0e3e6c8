"""dvc.yaml says what each stage reads; these tests hold it to that without running a stage."""

from functools import cache
from pathlib import Path

import grimp
import pytest
from ruamel.yaml import YAML

from pipeline.params.reading import read_yaml
from pipeline.params.schema import keys_of
from pipeline.params.stage_view import load_for_stage

ROOT = Path(__file__).parents[2]
STAGES = read_yaml(ROOT / "dvc.yaml")["stages"]

# What cannot change an output: params are declared key by key, and the rest only reports. A stage does not depend on it.
REPORTING = ("pipeline", "pipeline.params", "stages", "stages.run", "stages.launch", "stages.preflight", "stages.stale")


@cache
def graph() -> grimp.ImportGraph:
    """The pre-flight before a stage looks at everything and only says yes or no: what it imports decides no output."""
    found = grimp.build_graph("pipeline", "stages")
    found.remove_import(importer="stages.preflight", imported="pipeline.check.preflight")
    return found


def is_below(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def imports_of(stage: str) -> set[str]:
    """Project modules that a stage imports, directly or not, wherever in a file the import stands."""
    return graph().find_upstream_modules(f"stages.{stage}") | {f"stages.{stage}"}


def reports(module: str) -> bool:
    return module in REPORTING or is_below(module, "pipeline.params")


def code_of(stage: str) -> list[str]:
    """The dependencies of a stage that are code, as modules and packages."""
    listed = [dep for dep in STAGES[stage]["deps"] if dep.startswith(("pipeline/", "stages/"))]
    return [dep.removesuffix(".py").replace("/", ".") for dep in listed]


@pytest.mark.parametrize("stage", STAGES)
def test_everything_a_stage_imports_is_a_dependency(stage: str) -> None:
    imported = {module for module in imports_of(stage) if not reports(module)}
    packages = {package for package in imported if (ROOT / package.replace(".", "/")).is_dir()}
    missing = {module for module in imported if not any(is_below(module, listed) for listed in code_of(stage))}
    assert missing - packages == set(), "missing in dvc.yaml"
    needless = [listed for listed in code_of(stage) if not any(is_below(module, listed) for module in imported)]
    assert needless == [], "listed in dvc.yaml, not imported"


@pytest.mark.parametrize("stage", STAGES)
def test_dependencies_are_few_and_folders(stage: str) -> None:
    assert len(STAGES[stage]["deps"]) <= 12
    files = [dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")]
    assert files == [f"stages/{stage}.py"]


def test_what_only_reports_computes_nothing() -> None:
    """What is no dependency imports nothing that is one, but for `core`, which all stages depend on."""
    for module in graph().modules:
        if reports(module):
            imported = graph().find_upstream_modules(module)
            assert all(reports(found) or is_below(found, "pipeline.core") for found in imported), module


def test_a_stage_runs_where_dvc_is_not_installed() -> None:
    everything = grimp.build_graph("pipeline", "stages", include_external_packages=True)
    everything.remove_import(importer="stages.preflight", imported="pipeline.check.preflight")
    for stage in STAGES:
        assert "dvc" not in everything.find_upstream_modules(f"stages.{stage}")


def test_no_stage_imports_a_command() -> None:
    """.dvcignore leaves commands out of the folders that stages depend on."""
    for stage in STAGES:
        assert not [module for module in imports_of(stage) if module.endswith("__main__")]


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
    from pipeline.params.reading import load

    load(file)
